#include "tensor_map.h"

#include <stdexcept>
#include <string>

#include "elements.cuh"

namespace fastattn::cuda {
namespace {

constexpr int64_t kUnit = 16, kRowBytes = 128;

int64_t element_bytes(const MappedTensor& t) { return t.dtype == DType::kF32 ? 4 : 2; }

CUtensorMapDataType data_type(const MappedTensor& t) {
  switch (t.dtype) {
    case DType::kF32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case DType::kBF16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kF16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  }
  return {};
}

// In bytes. Of a dimension of size 1 the stride means nothing, and may be what TMA can't take.
int64_t stride_of(const MappedTensor& t, int64_t stride, int64_t size) {
  return size == 1 ? kUnit : stride * element_bytes(t);
}

bool can_stride(int64_t bytes) {
  return bytes > 0 && bytes % kUnit == 0 && bytes < int64_t{1} << 40;
}

}  // namespace

bool can_map(const MappedTensor& t) {
  return t.rows > 0 && t.batch > 0 && reinterpret_cast<uintptr_t>(t.data) % kUnit == 0 &&
         can_stride(stride_of(t, t.stride.batch, t.batch)) &&
         can_stride(stride_of(t, t.stride.seq, t.rows)) &&
         can_stride(stride_of(t, t.stride.head, t.heads));
}

#ifdef FASTATTN_EMULATE

CUtensorMap tensor_map(const MappedTensor& t) {
  const auto u64 = [](int64_t n) { return static_cast<uint64_t>(n); };
  const auto u32 = [](int64_t n) { return static_cast<uint32_t>(n); };
  return emulator::encode_tensor_map(
      data_type(t), const_cast<void*>(t.data),
      {u64(t.cols), u64(t.rows), u64(t.heads), u64(t.batch)},
      {u64(stride_of(t, t.stride.seq, t.rows)), u64(stride_of(t, t.stride.head, t.heads)),
       u64(stride_of(t, t.stride.batch, t.batch))},
      {u32(kRowBytes / element_bytes(t)), u32(t.box_rows), 1, 1}, true);
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
  const auto u64 = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const auto u32 = [](int64_t n) { return static_cast<cuuint32_t>(n); };
  const cuuint64_t sizes[4] = {u64(t.cols), u64(t.rows), u64(t.heads), u64(t.batch)};
  const cuuint64_t strides[3] = {u64(stride_of(t, t.stride.seq, t.rows)),
                                 u64(stride_of(t, t.stride.head, t.heads)),
                                 u64(stride_of(t, t.stride.batch, t.batch))};
  const cuuint32_t box[4] = {u32(kRowBytes / element_bytes(t)), u32(t.box_rows), 1, 1};
  const cuuint32_t every_element[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, data_type(t), 4, const_cast<void*>(t.data), sizes, strides, box, every_element,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("fastattn: cuTensorMapEncodeTiled returns " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

#endif

}  // namespace fastattn::cuda
