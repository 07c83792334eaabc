// Tensor maps: how bulk copies of Hopper are told where a tensor lies and which boxes are taken.
#pragma once

#include <cuda.h>

#include "launch.h"

namespace dendrite {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: the library does not link against the driver.
inline EncodeTensorMap find_encode_tensor_map() {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  check_cuda(cudaGetDriverEntryPointByVersion(kName, &function, 12000, cudaEnableDefault, &found),
             kName);
#else
  check_cuda(cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found), kName);
#endif
  if (found != cudaDriverEntryPointSuccess || function == nullptr)
    throw std::runtime_error(std::string("the driver has no ") + kName);
  return reinterpret_cast<EncodeTensorMap>(function);
}

// A matrix of `rows` rows of 64 * panels 16-bit values, seen as [panels][rows][64], in boxes of
// box_panels x box_rows x 64 with a 128-byte swizzle. A box is filled with zeros behind the last row.
inline CUtensorMap make_map_of_panels(const void* base, int64_t rows, int panels, int box_rows,
                                      int box_panels) {
  static const EncodeTensorMap encode = find_encode_tensor_map();
  CUtensorMap map;
  const cuuint64_t sizes[3] = {64, cuuint64_t(rows), cuuint64_t(panels)};
  const cuuint64_t strides[2] = {cuuint64_t(panels) * 128, 128};  // bytes; that of values is 2
  const cuuint32_t box[3] = {64, cuuint32_t(box_rows), cuuint32_t(box_panels)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(base), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("tensor map of " + std::to_string(rows) + " rows of " +
                             std::to_string(64 * panels) + " values: CUresult " +
                             std::to_string(int(status)));
  return map;
}

// The same, made once: a map depends on nothing but the arguments.
inline CUtensorMap map_of_panels(const void* base, int64_t rows, int panels, int box_rows,
                                 int box_panels) {
  constexpr size_t kMost = 4096;
  static std::mutex lock;
  static std::map<std::tuple<const void*, int64_t, int, int, int>, CUtensorMap> known;
  const std::lock_guard<std::mutex> guard(lock);
  const auto key = std::make_tuple(base, rows, panels, box_rows, box_panels);
  const auto place = known.find(key);
  if (place != known.end()) return place->second;
  if (known.size() >= kMost) known.clear();
  return known.emplace(key, make_map_of_panels(base, rows, panels, box_rows, box_panels))
      .first->second;
}

}  // namespace dendrite
