// Copying rows of a tensor into a tile of shared memory, while the warps compute.
//
// start() sets the copy going, finish() makes this thread's part of it land; a barrier after
// finish() shows it to the block. In between, sm_80 has it in flight (cp.async) and sm_75 in
// registers. Rows and columns that are not there become zeros.
#pragma once

#include "elements.cuh"
#include "fragments.cuh"
#include "ptx.cuh"

namespace fastattn::cuda {

// Where a tile's rows come from. `aligned`: every row starts at a multiple of 16 bytes and cols is
// a multiple of kChunk, so that chunks can be copied whole.
template <class T>
struct TileSource {
  const T* rows;
  int64_t stride;  // elements
  int cols;
  bool aligned;
};

// Up to kChunk elements, one by one; zeros behind.
template <class T>
FASTATTN_DEVICE uint4 gather_chunk(const T* from, int count) {
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; w++) {
    const uint32_t low = 2 * w < count ? from[2 * w].bits : 0;
    const uint32_t high = 2 * w + 1 < count ? from[2 * w + 1].bits : 0;
    words[w] = low | high << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The first `count` elements of a chunk, one by one.
template <class T>
FASTATTN_DEVICE void scatter_chunk(T* to, const uint4& chunk, int count) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < kChunk; i++) {
    if (i < count) to[i].bits = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
  }
}

// Whether every row of a (B, S, H, cols) tensor can be moved in chunks.
template <class T>
bool rows_aligned(const void* tensor, const Strides& stride, int64_t cols) {
  constexpr int64_t kElements = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(tensor) % 16 == 0 && cols % kElements == 0 &&
         stride.batch % kElements == 0 && stride.seq % kElements == 0 &&
         stride.head % kElements == 0;
}

template <class Arch, class T, int kRows, int kCols, int kThreads>
class TileCopy {
 public:
  FASTATTN_DEVICE TileCopy(const TileSource<T>& source, const SharedTile<kCols>& tile)
      : source_(source), tile_(tile) {}

  // Rows [first, first + kRows) of the source, of which those below `end` are there.
  FASTATTN_DEVICE void start(int first, int end) {
    if (source_.aligned) {
      start_chunks(first, end);
    } else {
      copy_elements(first, end);
    }
    if constexpr (Arch::kAsyncCopy) ptx::cp_async_commit();
  }

  FASTATTN_DEVICE void finish() {
    if constexpr (Arch::kAsyncCopy) {
      ptx::cp_async_wait<0>();
    } else if (source_.aligned) {
      const Place at = place();
#pragma unroll
      for (int i = 0; i < kRowSteps; i++) {
#pragma unroll
        for (int j = 0; j < kColSteps; j++) *target(at, i, j) = staged_[i][j];
      }
    }
  }

 private:
  // Threads that share a row: 128 or 64 bytes of it at a time.
  static constexpr int kLanes = SharedTile<kCols>::kGroup;
  static constexpr int kRowsAtOnce = kThreads / kLanes;
  static constexpr int kRowSteps = kRows / kRowsAtOnce;
  static constexpr int kColSteps = kCols / kChunk / kLanes;
  static_assert(kRowsAtOnce % 8 == 0 && kRows % kRowsAtOnce == 0);

  // This thread's place in the first kRowsAtOnce rows.
  struct Place {
    int row, chunk;
  };
  FASTATTN_DEVICE static Place place() {
    const int thread = ptx::anew(threadIdx.x);
    return {thread / kLanes, thread % kLanes};
  }
  FASTATTN_DEVICE uint4* target(Place at, int i, int j) const {
    return reinterpret_cast<uint4*>(tile_.chunk(at.row, at.chunk) +
                                    i * kRowsAtOnce * SharedTile<kCols>::kRowBytes +
                                    j * kLanes * 16);
  }

  FASTATTN_DEVICE void start_chunks(int first, int end) {
    const Place at = place();
    const int rows_left = end - first - at.row, cols_left = source_.cols - at.chunk * kChunk;
    const T* from = source_.rows + (first + at.row) * source_.stride + at.chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kRowSteps; i++, from += kRowsAtOnce * source_.stride) {
#pragma unroll
      for (int j = 0; j < kColSteps; j++) {
        const bool there = i * kRowsAtOnce < rows_left && j * kLanes * kChunk < cols_left;
        const T* piece = from + j * kLanes * kChunk;
        if constexpr (Arch::kAsyncCopy) {
          ptx::cp_async_16(target(at, i, j), piece, there ? 16 : 0);
        } else {
          staged_[i][j] = there ? *reinterpret_cast<const uint4*>(piece) : make_uint4(0, 0, 0, 0);
        }
      }
    }
  }

  // The slow way, with nothing in flight.
  FASTATTN_DEVICE void copy_elements(int first, int end) {
    const Place at = place();
#pragma unroll 1
    for (int i = 0; i < kRowSteps; i++) {
#pragma unroll 1
      for (int j = 0; j < kColSteps; j++) {
        const int row = first + at.row + i * kRowsAtOnce, col = (at.chunk + j * kLanes) * kChunk;
        *target(at, i, j) = gather_chunk(source_.rows + row * source_.stride + col,
                                         row < end ? source_.cols - col : 0);
      }
    }
  }

  TileSource<T> source_;
  SharedTile<kCols> tile_;
  uint4 staged_[Arch::kAsyncCopy ? 1 : kRowSteps][Arch::kAsyncCopy ? 1 : kColSteps];
};

// Rows [first, first + kRows) of the source with nothing to compute meanwhile: sm_80 sets them
// going, sm_75 copies a few at a time, so that they take few registers. finish_copies() makes this
// thread's part land.
template <class Arch, class T, int kRows, int kCols, int kThreads>
FASTATTN_DEVICE void copy_tile(const TileSource<T>& source, const SharedTile<kCols>& tile,
                               int first, int end) {
  if constexpr (Arch::kAsyncCopy) {
    TileCopy<Arch, T, kRows, kCols, kThreads>(source, tile).start(first, end);
  } else {
    constexpr int kSlice = kThreads / SharedTile<kCols>::kGroup;
#pragma unroll 1
    for (int row = 0; row < kRows; row += kSlice) {
      const SharedTile<kCols> slice{tile.bytes + row * SharedTile<kCols>::kRowBytes};
      TileCopy<Arch, T, kSlice, kCols, kThreads> copy(source, slice);
      copy.start(first + row, end);
      copy.finish();
    }
  }
}
template <class Arch>
FASTATTN_DEVICE void finish_copies() {
  if constexpr (Arch::kAsyncCopy) ptx::cp_async_wait<0>();
}

}  // namespace fastattn::cuda
