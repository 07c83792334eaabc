// Products of a few rows with a weight, at the speed at which the weight can be read.
#pragma once

#include <cstddef>

#include "dendrite/skinny_linear_params.h"
#include "dtype.h"

namespace dendrite {

// Cuts a product for a device with so many multiprocessors and so much shared memory for a block;
// `columns` are those of out.
SkinnyPlan plan_skinny_linear(int rows, int columns, int inputs, bool gated, int multiprocessors,
                              int shared_bytes);

// The plan for the current device.
SkinnyPlan plan_skinny_linear(int rows, int columns, int inputs, bool gated);

// Floats of SkinnyParams::partials that a plan needs.
size_t skinny_linear_partials(const SkinnyPlan& plan, int rows, int columns, bool gated);

// out = x weight^T + bias, or with `gated` silu(x gates^T) * (x ups^T). `dtype` (fp16 or bf16) is
// that of x, weight and bias; `out` is of that or fp32, gated of that.
void launch_skinny_linear(const SkinnyParams& params, Dtype dtype, Dtype out, bool gated,
                          cudaStream_t stream);

}  // namespace dendrite
