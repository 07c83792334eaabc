// Drawn tokens become the token ids of a pass that was planned before they were known.
#pragma once

#include "device.cuh"
#include "row_params.h"

namespace dendrite {

constexpr int kTakeThreads = 128;

// A token id of -1 - i becomes drawn[i]: for passes that start before the host knows their tokens.
// It stays what it is where there is no such one.
DENDRITE_KERNEL __launch_bounds__(kTakeThreads) take_tokens_kernel(TakeParams p) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int row = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (row >= p.rows) return;
  const int token = p.token_ids[row];
  if (token < 0 && -1 - token < p.count) p.token_ids[row] = p.drawn[-1 - token];
}

}  // namespace dendrite
