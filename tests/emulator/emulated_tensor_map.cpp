#include "emulated_tensor_map.h"

#include <stdexcept>
#include <string>

namespace emulator {

CUtensorMap encode_tensor_map(CUtensorMapDataType type, void* base, const uint64_t (&size)[4],
                              const uint64_t (&strides)[3], const uint32_t (&box)[4],
                              bool swizzled) {
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error("emulator: cuTensorMapEncodeTiled: " + what);
  };
  CUtensorMap m{};
  m.base = static_cast<unsigned char*>(base);
  m.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  m.swizzled = swizzled;
  require(reinterpret_cast<uintptr_t>(base) % 16 == 0, "the tensor isn't aligned to 16 bytes");
  for (int i = 0; i < CUtensorMap::kRank; ++i) {
    const std::string dimension = " in dimension " + std::to_string(i);
    require(size[i] >= 1 && size[i] <= uint64_t{1} << 32, "no size" + dimension);
    require(box[i] >= 1 && box[i] <= 256, "a box of " + std::to_string(box[i]) + dimension);
    m.size[i] = size[i];
    m.box[i] = box[i];
    m.stride[i] = i == 0 ? m.element_bytes : static_cast<int64_t>(strides[i - 1]);
    if (i == 0) continue;
    require(strides[i - 1] % 16 == 0 && strides[i - 1] > 0 && strides[i - 1] < uint64_t{1} << 40,
            "a stride of " + std::to_string(strides[i - 1]) + " bytes" + dimension);
  }
  const uint32_t row = box[0] * m.element_bytes;
  require(row % 16 == 0, "rows of a box are no multiple of 16 bytes");
  require(!swizzled || row <= 128, "rows of a box are longer than the swizzle");
  return m;
}

}  // namespace emulator
