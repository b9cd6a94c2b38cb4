// Working memory of a thread, kept between calls: a malloc per call costs 3-4 % at S = 256.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace fastattn::cpu {

// Hands out uninitialised arrays while it lives; one at a time per thread.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (Piece& piece : pieces()) {
      if (piece.floats > kKeptFloats) piece.release();
    }
  }

  // 64-byte aligned. Successive arrays start at different offsets in their 4 KiB pages: loads
  // behind a store to an equal offset would wait for it.
  float* take(int64_t floats) {
    std::vector<Piece>& all = pieces();
    if (taken_ == all.size()) all.emplace_back();
    Piece& piece = all[taken_];
    const size_t offset = taken_++ % 8 * 8 * kLine;
    const size_t needed = size_t(floats) + offset;
    if (piece.floats < needed) {
      piece.release();
      piece.data =
          static_cast<float*>(::operator new(needed * sizeof(float), std::align_val_t(kPageBytes)));
      piece.floats = needed;
    }
    return piece.data + offset;
  }

 private:
  static constexpr size_t kPageBytes = 4096, kLine = 64 / sizeof(float);
  static constexpr size_t kKeptFloats = (16 << 20) / sizeof(float);  // larger pieces are given back

  struct Piece {
    float* data = nullptr;
    size_t floats = 0;

    Piece() = default;
    Piece(Piece&& other) noexcept : data(other.data), floats(other.floats) { other.data = nullptr; }
    ~Piece() { release(); }
    void release() {
      ::operator delete(data, std::align_val_t(kPageBytes));
      data = nullptr;
      floats = 0;
    }
  };
  static std::vector<Piece>& pieces() {
    static thread_local std::vector<Piece> all;
    return all;
  }

  size_t taken_ = 0;
};

}  // namespace fastattn::cpu
