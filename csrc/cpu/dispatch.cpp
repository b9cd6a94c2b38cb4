// Picks the instruction set once, on first use.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastattn::cpu {
namespace {

const Kernels* const kBestFirst[] = {
#if defined(__x86_64__)
    &avx512_bf16::kKernels,
    &avx512::kKernels,
    &avx2::kKernels,
#endif
    &scalar::kKernels,
};

// The names of those that can be used here, but for `chosen`, each after a separator.
std::string usable(const Kernels* chosen, const std::string& separator) {
  std::string names;
  for (const Kernels* k : kBestFirst) {
    if (k != chosen && k->fit() != Fit::kUnusable) names += separator + k->isa;
  }
  return names;
}

const Kernels& choose() {
  const char* forced = std::getenv("FASTATTN_CPU_ISA");
  const bool any = forced == nullptr || *forced == '\0';
  for (const Kernels* k : kBestFirst) {
    const Fit fit = k->fit();
    if (any ? fit == Fit::kGood : fit != Fit::kUnusable && std::string(forced) == k->isa) return *k;
  }
  throw std::runtime_error("FASTATTN_CPU_ISA=" + std::string(forced) +
                           " can't be used here; usable: " + usable(nullptr, ", ").substr(2));
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::string instruction_sets() { return kernels().isa + usable(&kernels(), ";"); }

}  // namespace fastattn::cpu
