// Arithmetic as a GPU may have it at worst, with the option `coarse`: what a kernel's error must
// bear beside what libm and sums in the order of k show.
#pragma once

namespace emulator {

// `exact`, or, of ex2, lg2 and rcp, a float that the PTX ISA allows just so: `steps` floats beside
// it, on a side that its bits decide.
float approximated(float exact, int steps);

// sum + Σ a[i] · b[i · stride], as tensor cores add: products and sum are cut off at the last bit
// that the largest of them has in fp32, and so is what they come to. (Fasi et al., "Numerical
// behavior of NVIDIA tensor cores", 2021, found two or three bits more than that.)
float coarse_sum(float sum, const float* a, const float* b, int stride, int count);

}  // namespace emulator
