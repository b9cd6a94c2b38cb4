#include "tensor_map.h"

#include <stdexcept>
#include <string>

#include "elements.cuh"

namespace fastattn::cuda {
namespace {

constexpr int64_t kElementBytes = 2, kUnit = 16 / kElementBytes;  // elements in 16 bytes
constexpr unsigned kBoxCols = 64;                                 // 128 bytes

// Of a dimension of size 1 the stride means nothing, and may be what TMA can't take.
int64_t stride_or_unit(int64_t stride, int64_t size) { return size == 1 ? kUnit : stride; }

bool can_stride(int64_t stride, int64_t size) {
  stride = stride_or_unit(stride, size);
  return stride > 0 && stride % kUnit == 0 && stride < int64_t{1} << 38;
}

}  // namespace

bool can_map(const MappedTensor& t) {
  return t.rows > 0 && t.batch > 0 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
         can_stride(t.stride.batch, t.batch) && can_stride(t.stride.seq, t.rows) &&
         can_stride(t.stride.head, t.heads);
}

#ifdef FASTATTN_EMULATE

CUtensorMap tensor_map(const MappedTensor& t) {
  const auto bytes = [](int64_t stride, int64_t size) {
    return static_cast<uint64_t>(stride_or_unit(stride, size) * kElementBytes);
  };
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  return emulator::encode_tensor_map(
      t.dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      const_cast<void*>(t.data), {size(t.cols), size(t.rows), size(t.heads), size(t.batch)},
      {bytes(t.stride.seq, t.rows), bytes(t.stride.head, t.heads), bytes(t.stride.batch, t.batch)},
      {kBoxCols, static_cast<uint32_t>(t.box_rows), 1, 1}, true);
}

#else

CUtensorMap tensor_map(const MappedTensor& t) {
  // The driver's function is found at run time, so that this library needs no libcuda to load.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(std::string("fastattn: the driver has no cuTensorMapEncodeTiled: ") +
                               cudaGetErrorString(error));
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const auto bytes = [](int64_t stride, int64_t size) {
    return static_cast<cuuint64_t>(stride_or_unit(stride, size) * kElementBytes);
  };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(t.cols), static_cast<cuuint64_t>(t.rows),
                               static_cast<cuuint64_t>(t.heads), static_cast<cuuint64_t>(t.batch)};
  const cuuint64_t strides[3] = {bytes(t.stride.seq, t.rows), bytes(t.stride.head, t.heads),
                                 bytes(t.stride.batch, t.batch)};
  const cuuint32_t box[4] = {kBoxCols, static_cast<cuuint32_t>(t.box_rows), 1, 1};
  const cuuint32_t every_element[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = encode(
      &map,
      t.dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      4, const_cast<void*>(t.data), sizes, strides, box, every_element,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("fastattn: cuTensorMapEncodeTiled returns " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

#endif

}  // namespace fastattn::cuda
