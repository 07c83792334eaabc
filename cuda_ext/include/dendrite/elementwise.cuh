// Rows of an embedding table to the residual stream; SwiGLU.
#pragma once

#include "row_params.h"
#include "vectors.cuh"

namespace dendrite {

constexpr int kElementThreads = 128;
constexpr int kEmbedVector = 4;  // 16 bytes of the residual
template <class T>
constexpr int kSiluVector = 16 / int(sizeof(T));

// residual [rows, width] fp32 = table [vocabulary, width]; blocks_per_row blocks for each row. An
// id outside the table gives a row of NaN: its branch fails, and no other.
template <class T>
DENDRITE_KERNEL __launch_bounds__(kElementThreads) embed_kernel(EmbedParams p, int blocks_per_row) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int row = int(blockIdx.x) / blocks_per_row;
  const int block = int(blockIdx.x) % blocks_per_row;
  const int at = (block * int(blockDim.x) + int(threadIdx.x)) * kEmbedVector;
  if (at >= p.width) return;
  const int token = p.token_ids[row];
  float values[kEmbedVector];
  if (token >= 0 && token < p.vocabulary) {
    load_floats<kEmbedVector>(values,
                              static_cast<const T*>(p.table) + int64_t(token) * p.width + at);
  } else {
#pragma unroll
    for (int j = 0; j < kEmbedVector; ++j) values[j] = bits_float(0x7fc00000u);
  }
  store_floats<kEmbedVector>(p.residual + int64_t(row) * p.width + at, values);
}

// x / (1 + exp(-x)): 0 at -infinity, x at large x, NaN of NaN.
DENDRITE_DEVICE float silu(float x) {
  constexpr float kLog2E = 1.44269504f;
  return x / (1.0f + exp2_fast(-x * kLog2E));
}

// out [rows, width] = silu(gate_up[:, :width]) * gate_up[:, width:].
template <class T>
DENDRITE_KERNEL __launch_bounds__(kElementThreads)
    silu_mul_kernel(SiluParams p, int blocks_per_row) {
  constexpr int kVector = kSiluVector<T>;
  grid_dependency_launch();
  grid_dependency_wait();
  const int row = int(blockIdx.x) / blocks_per_row;
  const int block = int(blockIdx.x) % blocks_per_row;
  const int at = (block * int(blockDim.x) + int(threadIdx.x)) * kVector;
  if (at >= p.width) return;
  const T* gates = static_cast<const T*>(p.gate_up) + int64_t(row) * 2 * p.width + at;
  float gate[kVector], up[kVector];
  load_floats<kVector>(gate, gates);
  load_floats<kVector>(up, gates + p.width);
#pragma unroll
  for (int j = 0; j < kVector; ++j) gate[j] = silu(gate[j]) * up[j];
  store_floats<kVector>(static_cast<T*>(p.out) + int64_t(row) * p.width + at, gate);
}

}  // namespace dendrite
