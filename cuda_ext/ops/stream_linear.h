// Products of up to kStreamMaxRows rows with a weight on Hopper, at the speed at which the weight can
// be read.
#pragma once

#include "dendrite/stream_linear_params.h"
#include "dtype.h"

namespace dendrite {

struct StreamShape {
  int rows, columns, inputs;
  bool gated;
  Dtype dtype, out;  // fp16 or bf16; that or fp32, gated that
};

// Whether the current device has the kernel.
bool stream_linear_serves();

// How a product is cut on a device with so many multiprocessors. `splits`, and with it the order of
// the sums, depends on columns and inputs alone.
StreamPlan plan_stream_linear(const StreamShape& shape, int multiprocessors);
StreamPlan plan_stream_linear(const StreamShape& shape);

// out = x weight^T + bias, or gated silu(x gates^T) * (x ups^T). x [rows, inputs] and weight
// [columns (gated: 2 * columns, gates before ups), inputs] start at multiples of 16 bytes. The kernel
// ahead in the stream must not write the weight: it is read before that one has ended.
void launch_stream_linear(const StreamParams& params, const StreamShape& shape, const void* x,
                          const void* weight, cudaStream_t stream);

}  // namespace dendrite
