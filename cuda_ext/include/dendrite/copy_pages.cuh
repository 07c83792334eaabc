// Copy-on-write: the used slots of pages, in all layers, in one launch.
#pragma once

#include "device.cuh"
#include "row_params.h"

namespace dendrite {

constexpr int kCopyThreads = 256;
constexpr int kCopyUnroll = 4;

// Used slots of a head of a page lie side by side: one warp copies them. No page is both a source
// and a destination, so the order doesn't matter. The grid may have any size: it is chosen when a
// graph is captured, the number of copies when it is run.
//
// It never calls grid_dependency_launch(): everything behind it starts when it has ended. Attention
// reads pages of earlier steps before its own wait, and with each kernel between the two letting the
// next one start early, it could otherwise read a page that is still being copied.
DENDRITE_KERNEL __launch_bounds__(kCopyThreads) copy_pages_kernel(CopyParams p) {
  grid_dependency_wait();
  const int count = min(p.count[0], p.max_copies);
  const int warps = int(gridDim.x * (blockDim.x / kWarpSize));
  const int first = int((blockIdx.x * blockDim.x + threadIdx.x) / kWarpSize);
  const int lane = int(threadIdx.x % kWarpSize);
  const int per_copy = 2 * p.layers * p.kv_heads;
  const int64_t page_bytes = int64_t(p.kv_heads) * p.page_size * p.slot_bytes;
  const int64_t units = int64_t(max(count, 0)) * per_copy;
  for (int64_t unit = first; unit < units; unit += warps) {
    const int copy = int(unit / per_copy);
    const int rest = int(unit % per_copy);  // layer, then K or V, then head
    const int head = rest % p.kv_heads;
    const int layer = rest / p.kv_heads / 2;
    char* all = static_cast<char*>(rest / p.kv_heads % 2 == 0 ? p.k_all : p.v_all);
    const int source = p.copies[3 * copy], target = p.copies[3 * copy + 1];
    const int used = min(p.copies[3 * copy + 2], p.page_size);
    if (source < 0 || source >= p.pages || target < 0 || target >= p.pages) continue;
    char* base =
        all + int64_t(layer) * p.pages * page_bytes + int64_t(head) * p.page_size * p.slot_bytes;
    const char* from = base + source * page_bytes;
    char* to = base + target * page_bytes;
    const int bytes = used * p.slot_bytes;
    constexpr int kStep = 16 * int(kWarpSize);
    for (int at = lane * 16; at < bytes; at += kCopyUnroll * kStep) {
      uint4 held[kCopyUnroll];
#pragma unroll
      for (int i = 0; i < kCopyUnroll; ++i)
        if (at + i * kStep < bytes) held[i] = load_16(from + at + i * kStep);
#pragma unroll
      for (int i = 0; i < kCopyUnroll; ++i)
        if (at + i * kStep < bytes) store_16(to + at + i * kStep, held[i]);
    }
  }
}

}  // namespace dendrite
