// What csrc/bindings.cpp starts in the library of the CPU kernels, fastattn_C.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "cpu/kernels.h"

#define FASTATTN_OPS fastattn_C
#define FASTATTN_KEY CPU
#define FASTATTN_TARGET "instruction_sets"  // the operator that tells Kernels::target()

namespace fastattn {

class TorchPool final : public cpu::Pool {
 public:
  int threads() const override { return int(torch::stable::get_num_threads()); }

  // One long-lived worker a thread, drawing tasks from a counter: parallel_for alone would split
  // them statically.
  void run(int64_t count, const std::function<void(int64_t)>& task) const override {
    const int64_t workers = std::min<int64_t>(count, threads());
    if (workers <= 1) {
      for (int64_t i = 0; i < count; i++) task(i);
      return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      if (begin == end) return;
      for (int64_t i = next++; i < count; i = next++) task(i);
    });
  }
};

// The kernels, for one call of an operator with these arguments.
class Kernels {
 public:
  template <class... Arguments>
  explicit Kernels(const Arguments&...) {}

  void attn_fwd(const AttnFwdParams& p) const { table_.attn_fwd(p, pool_); }
  void attn_entropy(const AttnEntropyParams& p) const { table_.attn_entropy(p, pool_); }
  void attn_bwd(const AttnBwdParams& p) const { table_.attn_bwd(p, pool_); }
  void attn_decode(const AttnDecodeParams& p) const { table_.attn_decode(p, pool_); }
  void cache_append(const CacheAppendParams& p) const { table_.cache_append(p, pool_); }
  void cross_entropy_fwd(const CrossEntropyParams& p) const { table_.cross_entropy_fwd(p, pool_); }
  void cross_entropy_bwd(const CrossEntropyParams& p) const { table_.cross_entropy_bwd(p, pool_); }

  void matmul(const MatmulParams& p) const { table_.matmul(p, pool_); }

  static std::string target() { return cpu::instruction_sets(); }

 private:
  const cpu::Kernels& table_ = cpu::kernels();
  TorchPool pool_;
};

}  // namespace fastattn
