// RMS norm of rows of the residual stream, which first takes in what a layer added to it.
#pragma once

#include "row_params.h"
#include "vectors.cuh"

namespace dendrite {

// Values that a thread takes at a time: 16 bytes of the residual, the most that goes at once.
constexpr int kNormVector = 4;
constexpr int kMaxNormThreads = 512;
constexpr int kMaxNormItems = 8;
constexpr int kMaxNormWidth = kNormVector * kMaxNormThreads * kMaxNormItems;

// The same bits in every thread, in an order that depends on the number of warps alone.
DENDRITE_DEVICE float block_sum(float value, float* of_warps) {
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = value;
  sync_block();
  float total = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / kWarpSize; ++warp) total += of_warps[warp];
  return total;
}

// One block per row of out; thread t takes the vectors t, t + blockDim.x, ... (kItems of them).
// Shared memory: one float for each warp.
template <class T, int kItems>
DENDRITE_KERNEL __launch_bounds__(kMaxNormThreads) add_rms_norm_kernel(NormParams p) {
  DENDRITE_SHARED_MEMORY(float, of_warps);
  const T* weight = static_cast<const T*>(p.weight);
  Packed<T, kNormVector> weights[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int at = int(threadIdx.x + i * blockDim.x) * kNormVector;
    if (at < p.width) weights[i] = load_packed<T, kNormVector>(weight + at);
  }
  grid_dependency_launch();
  grid_dependency_wait();

  const int row = p.rows == nullptr ? int(blockIdx.x) : p.rows[blockIdx.x];
  const bool exists = row >= 0 && row < p.num_residual_rows;
  float* residual = p.residual + int64_t(exists ? row : 0) * p.width;
  const T* x = static_cast<const T*>(p.x) + int64_t(exists ? row : 0) * p.width;
  float values[kItems][kNormVector] = {};
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int at = int(threadIdx.x + i * blockDim.x) * kNormVector;
    if (at >= p.width || !exists) continue;
    load_floats<kNormVector>(values[i], residual + at);
    if (p.x != nullptr) {
      float added[kNormVector];
      load_floats<kNormVector>(added, x + at);
#pragma unroll
      for (int j = 0; j < kNormVector; ++j) values[i][j] += added[j];
      if (p.rows == nullptr) store_floats<kNormVector>(residual + at, values[i]);
    }
#pragma unroll
    for (int j = 0; j < kNormVector; ++j) squares += values[i][j] * values[i][j];
  }
  const float mean = block_sum(squares, of_warps) / float(p.width);
  const float scale = 1.0f / sqrtf(mean + p.eps);

  T* out = static_cast<T*>(p.out) + int64_t(blockIdx.x) * p.width;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int at = int(threadIdx.x + i * blockDim.x) * kNormVector;
    if (at >= p.width) continue;
    float factors[kNormVector];
    unpack<T, kNormVector>(factors, weights[i]);
#pragma unroll
    for (int j = 0; j < kNormVector; ++j) factors[j] *= values[i][j] * scale;
    store_floats<kNormVector>(out + at, factors);
  }
}

}  // namespace dendrite
