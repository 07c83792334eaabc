// Rotary embedding with QK norm and the store of K and V into pages.
#pragma once

#include "dendrite/row_params.h"
#include "dtype.h"

namespace dendrite {

void launch_rope_store_kv(const RopeParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace dendrite
