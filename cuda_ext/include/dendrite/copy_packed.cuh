// Copy-on-write of packed pages: whole pages, all layers, in one launch.
#pragma once

#include "device.cuh"
#include "packed_params.h"

namespace dendrite {

constexpr int kCopyPackedThreads = 256;
constexpr int kCopyPackedPiece = 8192;  // bytes that a block copies at once

// It never calls grid_dependency_launch(): see copy_pages_kernel.
DENDRITE_KERNEL __launch_bounds__(kCopyPackedThreads) copy_packed_kernel(CopyPackedParams p) {
  grid_dependency_wait();
  const int count = max(0, min(p.count[0], p.max_copies));
  const int64_t pieces = (p.page_bytes + kCopyPackedPiece - 1) / kCopyPackedPiece;
  for (int64_t unit = blockIdx.x; unit < count * pieces; unit += gridDim.x) {
    const int copy = int(unit / pieces);
    const int64_t begin = unit % pieces * kCopyPackedPiece;
    const int source = p.copies[3 * copy], target = p.copies[3 * copy + 1];
    if (source < 0 || source >= p.pages || target < 0 || target >= p.pages) continue;
    const char* from = p.data + source * p.page_bytes;
    char* to = p.data + target * p.page_bytes;
    const int64_t end = min(begin + kCopyPackedPiece, p.page_bytes);
#pragma unroll 2
    for (int64_t at = begin + 16 * int(threadIdx.x); at < end; at += 16 * kCopyPackedThreads)
      store_16(to + at, load_16(from + at));
  }
}

}  // namespace dendrite
