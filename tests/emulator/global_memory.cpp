#include "global_memory.h"

#include <dlfcn.h>
#include <pthread.h>

#include <cstdint>
#include <string>
#include <vector>

#include "arena.h"
#include "block.h"
#include "global_shadow.h"
#include "options.h"
#include "report.h"

namespace emulator {
namespace {

struct Buffer {
  uintptr_t begin;
  size_t bytes;
  std::string name;
  bool writable;
  int64_t launch = 0;  // that the shadow belongs to
  GlobalShadow shadow;
};
// Writable ones first: where an output takes an input's place, accesses are accesses to the output.
std::vector<Buffer> buffers;
size_t last_hit;
int64_t launches;

// Null where the range doesn't lie inside one buffer.
Buffer* find(uintptr_t p, size_t bytes) {
  const auto holds = [=](const Buffer& b) {
    return p - b.begin < b.bytes && p - b.begin + bytes <= b.bytes;
  };
  if (last_hit < buffers.size() && buffers[last_hit].writable && holds(buffers[last_hit])) {
    return &buffers[last_hit];
  }
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (holds(buffers[i])) {
      last_hit = i;
      return &buffers[i];
    }
  }
  return nullptr;
}

// Kernel parameters are copied from the host's stack, constants are read where the loader put them.
bool is_constant(const void* p) {
  static thread_local AddressRange host_stack = [] {
    pthread_attr_t attributes;
    void* begin = nullptr;
    size_t bytes = 0;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
      pthread_attr_getstack(&attributes, &begin, &bytes);
      pthread_attr_destroy(&attributes);
    }
    return AddressRange{reinterpret_cast<uintptr_t>(begin), bytes};
  }();
  Dl_info info;
  return host_stack.holds(p) || dladdr(p, &info) != 0;
}

[[noreturn]] void fail_outside(uintptr_t p, size_t bytes, const char* what, Site site) {
  const Buffer* nearest = nullptr;
  int64_t distance = 0, best = INT64_MAX;  // from the nearest buffer's begin
  for (const Buffer& b : buffers) {
    const auto from_begin = static_cast<int64_t>(p - b.begin);
    const int64_t outside =
        from_begin < 0 ? -from_begin
                       : from_begin + static_cast<int64_t>(bytes) - static_cast<int64_t>(b.bytes);
    if (outside < best) {
      best = outside;
      nearest = &b;
      distance = from_begin;
    }
  }
  if (nearest == nullptr) {
    fail(site, "%s of %zu bytes at %p: no buffer of global memory has been named", what, bytes,
         reinterpret_cast<void*>(p));
  }
  fail(site, "%s of %zu bytes at %p, outside all buffers: byte %lld of %s, which has %zu", what,
       bytes, reinterpret_cast<void*>(p), static_cast<long long>(distance), nearest->name.c_str(),
       nearest->bytes);
}

}  // namespace

void access_global(Thread& t, const void* p, size_t bytes, Access access, const char* what,
                   Site site) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  Buffer* buffer = find(address, bytes);
  if (buffer == nullptr) {
    if (access == Access::kRead && is_constant(p)) return;
    fail_outside(address, bytes, what, site);
  }
  if (access != Access::kRead && !buffer->writable) {
    fail(site, "%s to byte %zu of %s, which is only read", what,
         static_cast<size_t>(address - buffer->begin), buffer->name.c_str());
  }
  if (!buffer->writable || !options().races) return;
  if (buffer->launch != launches) {
    buffer->launch = launches;
    buffer->shadow.reset(buffer->name.c_str(), buffer->bytes);
  }
  buffer->shadow.access(t, address - buffer->begin, bytes, access, what, site);
}

void begin_global_launch() {
  ++launches;
  forget_synchronisation();
}

}  // namespace emulator

extern "C" void emulator_add_buffer(const void* address, int64_t bytes, const char* name,
                                    int writable) {
  if (bytes > 0) {
    auto& buffers = emulator::buffers;
    buffers.insert(writable ? buffers.begin() : buffers.end(),
                   {reinterpret_cast<uintptr_t>(address),
                    static_cast<size_t>(bytes),
                    name,
                    writable != 0,
                    0,
                    {}});
  }
}

extern "C" void emulator_clear_buffers() { emulator::buffers.clear(); }
