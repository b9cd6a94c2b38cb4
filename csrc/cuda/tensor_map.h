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

// A (B, S, H, D) tensor, of which boxes of `box_rows` rows of 128 bytes are copied, swizzled as
// PanelTile wants them.
struct MappedTensor {
  DType dtype;
  const void* data;
  int64_t batch, rows, heads, cols;
  Strides stride;
  int box_rows;
};

// A tensor of an attention problem.
inline MappedTensor mapped(const AttnFwdParams& p, const void* data, const Strides& stride,
                           int64_t rows, int64_t heads, int64_t cols, int box_rows) {
  return {p.dtype, data, p.cu_seqlens_q ? 1 : p.batch, rows, heads, cols, stride, box_rows};
}

// Whether TMA can copy it: 16-byte alignment, strides that are positive multiples of it, and any
// rows at all.
bool can_map(const MappedTensor& t);

// Throws std::runtime_error where the driver doesn't make one.
CUtensorMap tensor_map(const MappedTensor& t);

}  // namespace fastattn::cuda
