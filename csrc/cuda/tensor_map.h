// CUtensorMap: what TMA is told of a tensor, made on the host.
#pragma once

#include <cstdint>

#include "../params.h"

#ifdef FASTATTN_EMULATE
#include "emulated_tensor_map.h"
#else
#include <cuda.h>
#endif

namespace fastattn::cuda {

// A (B, S, H, D) tensor of 16-bit elements, of which boxes of `box_rows` rows and 64 columns are
// copied, swizzled as PanelTile wants them.
struct MappedTensor {
  DType dtype;
  const void* data;
  int64_t batch, rows, heads, cols;
  Strides stride;
  int box_rows;
};

// Whether TMA can copy it: 16-byte alignment, strides that are positive multiples of it, and any
// rows at all.
bool can_map(const MappedTensor& t);

// Throws std::runtime_error where the driver doesn't make one.
CUtensorMap tensor_map(const MappedTensor& t);

}  // namespace fastattn::cuda
