// launch_kernel and the questions about the device, with the CUDA runtime.
#pragma once

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace dendrite {

inline void check_cuda(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it: the next call reports its own
  throw std::runtime_error(what + ": " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + ")");
}

inline std::string kernel_name(const void* kernel) {
  const char* name = nullptr;
  if (cudaFuncGetName(&name, kernel) != cudaSuccess || name == nullptr) return "unknown kernel";
  const std::unique_ptr<char, void (*)(void*)> readable(
      abi::__cxa_demangle(name, nullptr, nullptr, nullptr), std::free);
  return readable ? readable.get() : name;
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// An attribute of the current device, asked for once.
template <cudaDeviceAttr kAttribute>
int device_attribute(const char* what) {
  static std::mutex lock;
  static std::map<int, int> known;
  const int device = current_device();
  const std::lock_guard<std::mutex> guard(lock);
  const auto [place, fresh] = known.try_emplace(device, 0);
  if (fresh) {
    const cudaError_t status = cudaDeviceGetAttribute(&place->second, kAttribute, device);
    if (status != cudaSuccess) known.erase(place);
    check_cuda(status, what);
  }
  return place->second;
}

// Multiprocessors of the current device.
inline int num_multiprocessors() {
  return device_attribute<cudaDevAttrMultiProcessorCount>("number of multiprocessors");
}

// Dynamic shared memory that a block on the current device can have.
inline int most_shared_bytes() {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>("shared memory of a block");
}

// Whether the current device is of the generation that has warpgroup products (wgmma, sm_90a).
inline bool has_warpgroup_products() {
  return device_attribute<cudaDevAttrComputeCapabilityMajor>("compute capability") == 9;
}

// Lets a kernel use `bytes` of dynamic shared memory; more than 48 KB has to be asked for, once per
// device.
inline void allow_shared_memory(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  static std::mutex lock;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const int device = current_device();
  const std::lock_guard<std::mutex> guard(lock);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
             kernel_name(kernel) + " with " + std::to_string(bytes) + " bytes of shared memory");
  most = bytes;
}

// Blocks of `threads` threads that one multiprocessor of the current device can hold at a time.
template <class... Parameters>
int max_blocks_per_multiprocessor(void (*kernel)(Parameters...), int threads, size_t smem) {
  static std::mutex lock;
  static std::map<std::tuple<const void*, int, int, size_t>, int> known;
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(function, smem);
  const int device = current_device();
  const std::lock_guard<std::mutex> guard(lock);
  const auto [place, fresh] = known.try_emplace({function, device, threads, smem}, 0);
  if (fresh)
    check_cuda(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&place->second, function, threads, smem),
        "occupancy of " + kernel_name(function));
  return place->second;
}

// Starts a kernel in clusters of so many blocks of the grid's x. With pdl it may start before the
// kernels ahead of it in the stream have ended, and waits for them in grid_dependency_wait(). Throws
// std::runtime_error naming the kernel.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, size_t smem,
                     cudaStream_t stream, bool pdl, Arguments&&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(function, smem);
  cudaLaunchAttribute attributes[2]{};
  int count = 0;
  if (pdl) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {unsigned(cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t status =
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (status != cudaSuccess) check_cuda(status, "launch of " + kernel_name(function));
}

// The same without clusters.
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem,
                   cudaStream_t stream, bool pdl, Arguments&&... arguments) {
  launch_clusters(kernel, 1, grid, block, smem, stream, pdl, std::forward<Arguments>(arguments)...);
}

}  // namespace dendrite
