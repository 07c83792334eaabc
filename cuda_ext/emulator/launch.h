// What launchers need of the CUDA runtime, on a CPU: launch_kernel runs the emulator at once.
#pragma once

#include <atomic>
#include <cstring>

#include "emulator.h"

struct CUstream_st;
typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0 };

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace dendrite {
namespace emulator {

DENDRITE_HIDDEN inline std::atomic<int> multiprocessors{4};
DENDRITE_HIDDEN inline std::atomic<int> blocks_per_multiprocessor{2};

// The device that launchers see; the grid of a persistent kernel follows it.
inline void set_device(int num_multiprocessors, int max_blocks_per_multiprocessor) {
  multiprocessors = num_multiprocessors;
  blocks_per_multiprocessor = max_blocks_per_multiprocessor;
}

}  // namespace emulator

inline void check_cuda(cudaError_t, const std::string&) {}

inline int num_multiprocessors() { return emulator::multiprocessors; }
inline int most_shared_bytes() { return int(emulator::kMaxSharedBytes); }

template <class... Parameters>
int max_blocks_per_multiprocessor(void (*)(Parameters...), int, size_t) {
  return emulator::blocks_per_multiprocessor;
}

template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), emulator::Grid grid, dim3 block, size_t smem,
                   cudaStream_t, bool, Arguments&&... arguments) {
  emulate(kernel, grid, block, smem, std::forward<Arguments>(arguments)...);
}

}  // namespace dendrite

// For a test that has loaded a library with launchers in it.
extern "C" __attribute__((visibility("default"), used)) inline void dendrite_emulator_set_device(
    int num_multiprocessors, int max_blocks_per_multiprocessor) {
  dendrite::emulator::set_device(num_multiprocessors, max_blocks_per_multiprocessor);
}
