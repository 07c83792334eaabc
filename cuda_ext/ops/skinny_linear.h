// Products of a few rows with a weight, at the speed at which the weight can be read.
#pragma once

#include "dendrite/skinny_linear_params.h"
#include "dtype.h"

namespace dendrite {

// Cuts a product for a device with so many multiprocessors; `columns` are those of out.
SkinnyPlan plan_skinny_linear(int columns, int inputs, bool gated, int multiprocessors);

// The plan for the current device.
SkinnyPlan plan_skinny_linear(int columns, int inputs, bool gated);

// out = x weight^T + bias, or with `gated` silu(x gates^T) * (x ups^T). `dtype` (fp16 or bf16) is
// that of x, weight and bias; `out` is of that or fp32, gated of that.
void launch_skinny_linear(const SkinnyParams& params, Dtype dtype, Dtype out, bool gated,
                          cudaStream_t stream);

}  // namespace dendrite
