// The kernels in plain C++ for any processor.
#include "isa_headers.h"

namespace fastattn::cpu::scalar {

#include "vec_scalar.h"
#include "all_kernels.inl.h"

static Fit fit() { return Fit::kGood; }
const Kernels kKernels = FASTATTN_KERNEL_TABLE("scalar");

}  // namespace fastattn::cpu::scalar
