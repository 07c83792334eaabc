// What stores, turns and copies packed vectors.
#pragma once

#include "dendrite/packed_params.h"
#include "dtype.h"

namespace dendrite {

void launch_rope_store_packed(const RopePackedParams& params, Dtype dtype, cudaStream_t stream);

void launch_rotate_back(const RotateParams& params, Dtype dtype, cudaStream_t stream);

// The grid depends on max_copies and the device alone, so that a captured launch serves any count.
void launch_copy_packed(const CopyPackedParams& params, cudaStream_t stream);

}  // namespace dendrite
