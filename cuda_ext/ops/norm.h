// RMS norm of the residual stream.
#pragma once

#include "dendrite/row_params.h"
#include "dtype.h"

namespace dendrite {

// Whether rows of this width can be normed: a multiple of 4, up to 16384.
bool norm_takes_width(int width);

void launch_add_rms_norm(const NormParams& params, int num_rows, Dtype dtype, cudaStream_t stream);

}  // namespace dendrite
