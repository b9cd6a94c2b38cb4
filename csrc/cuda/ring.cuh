// Buffers in shared memory that a producer's copies fill and consumers free, in turn.
#pragma once

#include "ptx_sm90.cuh"

namespace fastattn::cuda {

template <int kStages>
class Ring {
 public:
  static constexpr int kBarriers = 2 * kStages;

  // `barriers`: kBarriers of them.
  FASTATTN_DEVICE explicit Ring(uint64_t* barriers) : full_(barriers), empty_(full_ + kStages) {}

  // By one thread; a fence_proxy_async and a __syncthreads make it known.
  FASTATTN_DEVICE void init(int consumer_warps) const {
    for (int s = 0; s < kStages; s++) {
      ptx::mbarrier_init(full_ + s, 1);
      ptx::mbarrier_init(empty_ + s, consumer_warps);
    }
  }

  // The buffer whose turn it is.
  FASTATTN_DEVICE int stage() const { return stage_; }
  FASTATTN_DEVICE void advance() {
    if (++stage_ == kStages) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

  // The producer: waits until the buffer is free; the barrier is for copies of `bytes` to it.
  FASTATTN_DEVICE uint64_t* acquire(int bytes) const {
    wait_free();
    ptx::mbarrier_arrive_expect_tx(full_ + stage_, bytes);
    return full_ + stage_;
  }
  // Without copies: a warp waits, has written the buffer by itself.
  FASTATTN_DEVICE void wait_free() const { ptx::mbarrier_wait(empty_ + stage_, phase_ ^ 1); }
  FASTATTN_DEVICE void publish() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(full_ + stage_);
    advance();
  }

  // A consumer's warps: wait until the buffer is full; have read it.
  FASTATTN_DEVICE void wait() const { ptx::mbarrier_wait(full_ + stage_, phase_); }
  FASTATTN_DEVICE void release() {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty_ + stage_);
    advance();
  }

 private:
  uint64_t *full_, *empty_;
  int stage_ = 0, phase_ = 0;
};

}  // namespace fastattn::cuda
