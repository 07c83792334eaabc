#include <algorithm>

#include "copy_pages.h"
#include "dendrite/copy_pages.cuh"
#include "launch.h"

namespace dendrite {

void launch_copy_pages(const CopyParams& params, cudaStream_t stream) {
  constexpr int64_t kWarps = kCopyThreads / kWarpSize;
  constexpr int64_t kBlocksPerMultiprocessor = 4;  // 2 KB under way in each of their 8 warps
  const int64_t units = int64_t(params.max_copies) * 2 * params.layers * params.kv_heads;
  if (units == 0) return;
  const int64_t blocks =
      std::min((units + kWarps - 1) / kWarps, num_multiprocessors() * kBlocksPerMultiprocessor);
  launch_kernel(copy_pages_kernel, dim3(unsigned(blocks)), dim3(kCopyThreads), 0, stream, true,
                params);
}

}  // namespace dendrite
