// The kernels for AVX512. Everything between push and pop is compiled for it; standard headers come
// before, so that no inline function of theirs is emitted in an encoding other processors can't
// run.
#include "isa_headers.h"

#if defined(__x86_64__)
// GCC's own headers read undefined registers on purpose and, inlined, are warned about: GCC bug
// 105593.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace fastattn::cpu::avx512 {

#include "vec_avx512.h"
#include "all_kernels.inl.h"

static Fit fit() {
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has ? Fit::kGood : Fit::kUnusable;
}
const Kernels kKernels = FASTATTN_KERNEL_TABLE("avx512");

}  // namespace fastattn::cpu::avx512
#pragma GCC pop_options
#endif
