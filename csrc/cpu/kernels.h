// The CPU backend's face: one table of entry points per instruction set, and the threads they run
// on.
#pragma once

#include <functional>
#include <string>

#include "../params.h"

namespace fastattn::cpu {

// The caller's threads. run(count, task) calls task(0) … task(count - 1), each once, in about that
// order, and returns when all are done. Kernels put their heaviest tasks first.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int threads() const = 0;
  virtual void run(int64_t count, const std::function<void(int64_t)>& task) const = 0;
};

// Whether this processor has an instruction set, and whether it is to be chosen there.
enum class Fit { kUnusable, kOnRequest, kGood };

struct Kernels {
  const char* isa;
  Fit (*fit)();
  void (*attn_fwd)(const AttnFwdParams&, const Pool&);
  void (*attn_entropy)(const AttnEntropyParams&, const Pool&);
  void (*attn_bwd)(const AttnBwdParams&, const Pool&);
  void (*attn_decode)(const AttnDecodeParams&, const Pool&);
  void (*cache_append)(const CacheAppendParams&, const Pool&);
  void (*cross_entropy_fwd)(const CrossEntropyParams&,
                            const Pool&);  // loss, lse; the gradient too where dlogits is set
  void (*cross_entropy_bwd)(const CrossEntropyParams&, const Pool&);  // the gradient from lse
  void (*matmul)(const MatmulParams&, const Pool&);
};

// The best for this processor. FASTATTN_CPU_ISA=scalar|avx2|avx512|avx512_bf16 forces one; throws
// std::runtime_error naming the usable ones otherwise.
const Kernels& kernels();
// Their instruction set, and behind it the others that could be forced here: "avx2;scalar".
std::string instruction_sets();

namespace avx512_bf16 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace scalar {
extern const Kernels kKernels;
}

}  // namespace fastattn::cpu
