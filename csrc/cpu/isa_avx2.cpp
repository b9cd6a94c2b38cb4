// The kernels for AVX2. Everything between push and pop is compiled for it; standard headers come
// before, so that no inline function of theirs is emitted in an encoding other processors can't
// run.
#include "isa_headers.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace fastattn::cpu::avx2 {

#include "vec_avx2.h"
#include "all_kernels.inl.h"

static Fit fit() {
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c");
  return has ? Fit::kGood : Fit::kUnusable;
}
const Kernels kKernels = FASTATTN_KERNEL_TABLE("avx2");

}  // namespace fastattn::cpu::avx2
#pragma GCC pop_options
#endif
