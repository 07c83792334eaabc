// Drawn tokens, embedding rows and SwiGLU.
#pragma once

#include "dendrite/row_params.h"
#include "dtype.h"

namespace dendrite {

void launch_take_tokens(const TakeParams& params, cudaStream_t stream);
void launch_embed(const EmbedParams& params, Dtype dtype, cudaStream_t stream);
void launch_silu_mul(const SiluParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace dendrite
