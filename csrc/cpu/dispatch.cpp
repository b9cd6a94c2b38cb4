// Picks the instruction set once, on first use.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastattn::cpu {
namespace {

const Kernels* const kBestFirst[] = {
#if defined(__x86_64__)
    &avx512::kKernels,
    &avx2::kKernels,
#endif
    &scalar::kKernels,
};

const Kernels& choose() {
  const char* forced = std::getenv("FASTATTN_CPU_ISA");
  const bool any = forced == nullptr || *forced == '\0';
  std::string usable;
  for (const Kernels* k : kBestFirst) {
    if (!k->usable()) continue;
    if (any || std::string(forced) == k->isa) return *k;
    usable += std::string(usable.empty() ? "" : ", ") + k->isa;
  }
  throw std::runtime_error("FASTATTN_CPU_ISA=" + std::string(forced) +
                           " can't be used here; usable: " + usable);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fastattn::cpu
