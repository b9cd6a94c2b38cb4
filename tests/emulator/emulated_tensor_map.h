// cuTensorMapEncodeTiled's CUtensorMap, as the emulator keeps it: a view of a tensor in global
// memory, up to 4-D, innermost first, of which boxes are copied.
#pragma once

#include <cstdint>

enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
};

struct alignas(64) CUtensorMap {
  static constexpr int kRank = 4;
  unsigned char* base;
  uint64_t size[kRank];
  int64_t stride[kRank];  // bytes
  uint32_t box[kRank];
  int element_bytes;
  bool swizzled;  // 128 bytes

  int box_bytes() const {
    return static_cast<int>(box[0] * box[1] * box[2] * box[3]) * element_bytes;
  }
};
static_assert(sizeof(CUtensorMap) == 128);

namespace emulator {

// `strides` of dimensions 1 to 3, in bytes. Throws std::runtime_error where the driver would
// return an error, or a copy would fail.
CUtensorMap encode_tensor_map(CUtensorMapDataType type, void* base, const uint64_t (&size)[4],
                              const uint64_t (&strides)[3], const uint32_t (&box)[4],
                              bool swizzled);

}  // namespace emulator
