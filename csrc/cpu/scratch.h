// Working memory of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastattn::cpu {

// Uninitialised floats from the start of a page on.
class Buffer {
 public:
  explicit Buffer(size_t floats = 0)
      : size_(floats),
        data_(floats == 0 ? nullptr
                          : static_cast<float*>(::operator new(floats * sizeof(float), kPage))) {}
  Buffer(Buffer&& other) noexcept : Buffer() { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(size_, other.size_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { ::operator delete(data_, kPage); }

  float* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  static constexpr std::align_val_t kPage{4096};
  size_t size_;
  float* data_;
};

// Hands out arrays of a thread's own, kept from call to call: allocating them each time would cost
// 3-4 % at S = 256. At most one Scratch lives on a thread.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (Buffer& buffer : buffers()) {
      if (buffer.size() > kKeptFloats) buffer = Buffer();
    }
  }

  // Uninitialised and 64-byte aligned. Successive arrays start at different offsets in their pages:
  // a load would wait for an earlier store to the same offset of another page.
  float* take(int64_t floats) {
    std::vector<Buffer>& all = buffers();
    if (taken_ == all.size()) all.emplace_back();
    const size_t offset = taken_ % 8 * 8 * kLine;
    Buffer& buffer = all[taken_++];
    if (buffer.size() < size_t(floats) + offset) buffer = Buffer(size_t(floats) + offset);
    return buffer.data() + offset;
  }

 private:
  static constexpr size_t kLine = 64 / sizeof(float);
  static constexpr size_t kKeptFloats = (16 << 20) / sizeof(float);  // larger ones are given back

  static std::vector<Buffer>& buffers() {
    static thread_local std::vector<Buffer> all;
    return all;
  }

  size_t taken_ = 0;
};

// Asks for huge pages under large outputs in fresh memory: faulting 4 KiB pages in takes longer
// than filling them.
inline void advise_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = int64_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) & -kHugePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) & -kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastattn::cpu
