// Copy-on-write page copies of all layers.
#pragma once

#include "dendrite/row_params.h"
#include "dtype.h"

namespace dendrite {

// The grid depends on max_copies and the device alone, so that a captured launch serves any count.
void launch_copy_pages(const CopyParams& params, cudaStream_t stream);

}  // namespace dendrite
