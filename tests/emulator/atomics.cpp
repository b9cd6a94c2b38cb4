// Atomics on global and shared memory, and __threadfence.
#include <algorithm>

#include "arena.h"
#include "block.h"
#include "global_memory.h"
#include "global_shadow.h"
#include "options.h"
#include "planted_fault.h"
#include "report.h"

namespace emulator {
namespace {

template <class T, class Update>
T atomic(T* p, const char* what, Site site, const Update& update) {
  Thread& t = *current;
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) {
    fail(site, "%s at %p, not aligned to %zu", what, static_cast<void*>(p), sizeof(T));
  }
  if (shared_range.holds(p)) {
    access_shared(t, p, sizeof(T), Access::kAtomic, what, site);
  } else {
    access_global(t, p, sizeof(T), Access::kAtomic, what, site);
  }
  if (options().races) synchronise_through_atomic(t, p);
  const T before = *p;
  *p = update(before);
  if (options().co_scheduled) yield_thread();
  return before;
}

template <class T>
T add(T* p, T x, Site site) {
  return atomic(p, "atomicAdd", site, [=](T y) { return y + x; });
}
template <class T>
T max(T* p, T x, Site site) {
  return atomic(p, "atomicMax", site, [=](T y) { return std::max(x, y); });
}

}  // namespace

float atomic_add(float* p, float x, Site site) { return add(p, x, site); }
int32_t atomic_add(int32_t* p, int32_t x, Site site) { return add(p, x, site); }
uint32_t atomic_add(uint32_t* p, uint32_t x, Site site) { return add(p, x, site); }
unsigned long long atomic_add(unsigned long long* p, unsigned long long x, Site site) {
  return add(p, x, site);
}
int32_t atomic_max(int32_t* p, int32_t x, Site site) { return max(p, x, site); }
uint32_t atomic_max(uint32_t* p, uint32_t x, Site site) { return max(p, x, site); }
uint32_t atomic_exchange(uint32_t* p, uint32_t x, Site site) {
  return atomic(p, "atomicExch", site, [=](uint32_t) { return x; });
}
uint32_t atomic_compare_exchange(uint32_t* p, uint32_t expected, uint32_t x, Site site) {
  return atomic(p, "atomicCAS", site, [=](uint32_t y) { return y == expected ? x : y; });
}

void thread_fence(Site site) {
  if (options().races && !is_left_out(site)) fence(*current);
}

}  // namespace emulator
