#include "skinny_linear.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "dendrite/skinny_linear.cuh"
#include "dendrite/skinny_linear_wide.cuh"
#include "launch.h"

namespace dendrite {
namespace {

constexpr int kWideDepth = 4;
constexpr int kMaxNarrowRows = 16;
// Bytes of the weight that a block asks into L2 while it waits for the kernel ahead: with the ring,
// less than half of an H100's L2 for the whole grid.
constexpr int kAheadBytes = 96 * 1024;

int divide_up(int value, int by) { return (value + by - 1) / by; }

// Stages of the ring: about 96 KB with x, so that two blocks fit into a multiprocessor.
constexpr int narrow_depth(int tiles, int groups) {
  return tiles == 2 ? 4 : groups == 2 ? 6 : 8;
}

// Bytes of shared memory that a block of the current device can have.
int max_shared_bytes() {
#ifdef DENDRITE_EMULATE
  return 227 * 1024;
#else
  static std::mutex lock;
  static std::map<int, int> known;
  const int device = current_device();
  const std::lock_guard<std::mutex> guard(lock);
  int& bytes = known[device];
  if (bytes == 0)
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "shared memory of a block");
  return bytes;
#endif
}

// Spreads the columns evenly: one block of equal size for each of `places`, in as few rounds as
// tiles of max_tile columns allow. A tile may be short of rows: they cost MMAs, no memory traffic.
void spread(SkinnyPlan& plan, int columns, int places, int max_tile) {
  const int per_block = divide_up(columns, places);
  plan.rounds = divide_up(per_block, max_tile);
  plan.tile = divide_up(per_block, plan.rounds);
  plan.blocks = divide_up(columns, plan.tile * plan.rounds);
}

// Microseconds that a wide plan takes, by what it moves: weights from memory at 3 bytes per ps, and
// with x (once per block and round) and the sums of pairs from L2 at 5.
double wide_time(const SkinnyPlan& plan, int rows, double weight_rows, double inputs) {
  const double weights = weight_rows * inputs * 2;
  const double x = double(plan.blocks) * plan.rounds * rows * inputs * 2;
  const double sums = plan.splits > 1 ? 2.0 * kSkinnyPairs * rows * weight_rows * sizeof(float) : 0;
  const double finish = plan.splits > 1 ? 1.5 : 0;
  return std::max(weights / 3.0e6, (weights + x + sums) / 5.0e6) + finish;
}

template <class T, class Out, int kTiles, int kGroups, int kDepth, bool kGated>
void launch_narrow(const SkinnyParams& p, cudaStream_t stream) {
  launch_kernel(skinny_linear_kernel<T, Out, kTiles, kGroups, kDepth, kGated>,
                dim3(p.plan.blocks), dim3(kSkinnyThreads),
                skinny_shared_bytes(kTiles, kGroups, kDepth, p.rows), stream, true, p);
}

template <class T, class Out, int kTiles, int kGroups, bool kGated>
void launch_narrow(const SkinnyParams& p, cudaStream_t stream) {
  constexpr int kDepth = narrow_depth(kTiles, kGroups);
  launch_narrow<T, Out, kTiles, kGroups, kDepth, kGated>(p, stream);
}

template <class T, class Out, int kGroups, bool kGated>
void launch_wide(const SkinnyParams& p, cudaStream_t stream) {
  const dim3 grid(p.plan.blocks, p.plan.splits);
  const size_t smem = skinny_wide_shared_bytes(kGroups, kWideDepth);
  if (p.plan.splits == 1)
    return launch_kernel(skinny_linear_wide_kernel<T, Out, kGroups, kWideDepth, kGated, false>,
                         grid, dim3(kSkinnyThreads), smem, stream, true, p);
  // What the parts leave in p.partials doesn't depend on the type of out.
  launch_kernel(skinny_linear_wide_kernel<T, T, kGroups, kWideDepth, kGated, true>, grid,
                dim3(kSkinnyThreads), smem, stream, true, p);
  launch_kernel(skinny_linear_finish_kernel<T, Out, kGated>,
                dim3(divide_up(p.columns, kSkinnyThreads), p.rows), dim3(kSkinnyThreads), 0, stream,
                true, p);
}

template <class T, class Out, bool kGated>
void launch(const SkinnyParams& p, cudaStream_t stream) {
  if (p.plan.wide) {
    if (p.rows <= 32) return launch_wide<T, Out, 4, kGated>(p, stream);
    return launch_wide<T, Out, 8, kGated>(p, stream);
  }
  if (p.plan.tiles == 1) {
    if (p.rows <= 8) return launch_narrow<T, Out, 1, 1, kGated>(p, stream);
    return launch_narrow<T, Out, 1, 2, kGated>(p, stream);
  }
  if (p.rows <= 8) return launch_narrow<T, Out, 2, 1, kGated>(p, stream);
  launch_narrow<T, Out, 2, 2, kGated>(p, stream);
}

template <class T>
void launch(const SkinnyParams& p, bool fp32_out, bool gated, cudaStream_t stream) {
  if (gated) return launch<T, T, true>(p, stream);
  if (fp32_out) return launch<T, float, false>(p, stream);
  launch<T, T, false>(p, stream);
}

}  // namespace

SkinnyPlan plan_skinny_linear(int rows, int columns, int inputs, bool gated, int multiprocessors,
                              int shared_bytes) {
  SkinnyPlan plan{};
  plan.splits = 1;
  const int tile = gated ? 8 : 16;
  plan.tiles = divide_up(columns, multiprocessors) <= tile ? 1 : 2;
  const int groups = rows <= 8 ? 1 : 2;
  plan.wide = rows > kMaxNarrowRows ||
              skinny_shared_bytes(plan.tiles, groups, narrow_depth(plan.tiles, groups), rows) >
                  shared_bytes;
  if (!plan.wide) {
    spread(plan, columns, multiprocessors, plan.tiles * tile);
    plan.ahead = kAheadBytes / (inputs * 2);
    return plan;
  }
  double best = 0;
  SkinnyPlan found = plan;
  for (plan.splits = 1; plan.splits <= kSkinnyPairs; plan.splits *= 2) {
    spread(plan, columns, std::max(multiprocessors / plan.splits, 1), kSkinnyWarps * tile);
    const double time = wide_time(plan, rows, double(columns) * (gated ? 2 : 1), inputs);
    if (plan.splits > 1 && time >= best) continue;
    best = time;
    found = plan;
  }
  found.ahead = kAheadBytes / (inputs * 2) * found.splits;
  return found;
}

SkinnyPlan plan_skinny_linear(int rows, int columns, int inputs, bool gated) {
  return plan_skinny_linear(rows, columns, inputs, gated, num_multiprocessors(),
                            max_shared_bytes());
}

size_t skinny_linear_partials(const SkinnyPlan& plan, int rows, int columns, bool gated) {
  if (plan.splits == 1) return 0;
  return size_t(kSkinnyPairs) * rows * columns * (gated ? 2 : 1);
}

void launch_skinny_linear(const SkinnyParams& params, Dtype dtype, Dtype out, bool gated,
                          cudaStream_t stream) {
  if (params.rows == 0 || params.columns == 0) return;
  const bool fp32_out = out == Dtype::kF32;
  if (dtype == Dtype::kF16) return launch<half_t>(params, fp32_out, gated, stream);
  launch<bf16>(params, fp32_out, gated, stream);
}

}  // namespace dendrite
