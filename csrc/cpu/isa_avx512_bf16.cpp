// The kernels for AVX-512 with AVX512-BF16. Everything between push and pop is compiled for it;
// standard headers come before, so that no inline function of theirs is emitted in an encoding
// other processors can't run.
#define FASTATTN_DOTS_BF16
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
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace fastattn::cpu::avx512_bf16 {

#include "vec_avx512.h"
#include "vec_avx512_bf16.h"
#include "all_kernels.inl.h"

// Intel's processors take bf16 at half the rate of fp32 here (measured on Emerald Rapids), AMD's at
// twice (Zen 5).
static Fit fit() {
  if (!__builtin_cpu_supports("avx512bf16")) return Fit::kUnusable;
  return __builtin_cpu_is("amd") ? Fit::kGood : Fit::kOnRequest;
}
const Kernels kKernels = FASTATTN_KERNEL_TABLE("avx512_bf16");

}  // namespace fastattn::cpu::avx512_bf16
#pragma GCC pop_options
#endif
