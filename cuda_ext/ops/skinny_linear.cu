#include "skinny_linear.h"

#include <map>
#include <mutex>

#include "dendrite/skinny_linear.cuh"
#include "launch.h"

namespace dendrite {
namespace {

// Bytes of the weight that a block asks into L2 while it waits for the kernel ahead: with the ring,
// less than half of an H100's L2 for the whole grid.
constexpr int kAheadBytes = 96 * 1024;

int divide_up(int value, int by) { return (value + by - 1) / by; }

// Stages of the ring: about 96 KB with x, so that two blocks fit into a multiprocessor.
constexpr int depth_of(int tiles, int groups) { return tiles == 2 ? 4 : groups == 2 ? 6 : 8; }
constexpr int kShallow = 3;  // where a block can't have as much: up to 84 KB

// Spreads the columns evenly: one block of equal size for each of `places`, in as few rounds as
// tiles of max_tile columns allow. A tile may be short of rows: they cost MMAs, no memory traffic.
void spread(SkinnyPlan& plan, int columns, int places, int max_tile) {
  const int per_block = divide_up(columns, places);
  plan.rounds = divide_up(per_block, max_tile);
  plan.tile = divide_up(per_block, plan.rounds);
  plan.blocks = divide_up(columns, plan.tile * plan.rounds);
}

template <class T, class Out, int kTiles, int kGroups, int kDepth, bool kGated>
void launch(const SkinnyParams& p, cudaStream_t stream) {
  launch_kernel(skinny_linear_kernel<T, Out, kTiles, kGroups, kDepth, kGated>,
                dim3(p.plan.blocks), dim3(kSkinnyThreads),
                skinny_shared_bytes(kTiles, kGroups, kDepth, p.rows), stream, true, p);
}

template <class T, class Out, int kTiles, int kGroups, bool kGated>
void launch(const SkinnyParams& p, cudaStream_t stream) {
  constexpr int kDepth = depth_of(kTiles, kGroups);
  if (skinny_shared_bytes(kTiles, kGroups, kDepth, p.rows) > most_shared_bytes())
    return launch<T, Out, kTiles, kGroups, kShallow, kGated>(p, stream);
  launch<T, Out, kTiles, kGroups, kDepth, kGated>(p, stream);
}

template <class T, class Out, bool kGated>
void launch(const SkinnyParams& p, cudaStream_t stream) {
  if (p.plan.tiles == 1) {
    if (p.rows <= 8) return launch<T, Out, 1, 1, kGated>(p, stream);
    return launch<T, Out, 1, 2, kGated>(p, stream);
  }
  if (p.rows <= 8) return launch<T, Out, 2, 1, kGated>(p, stream);
  launch<T, Out, 2, 2, kGated>(p, stream);
}

template <class T>
void launch(const SkinnyParams& p, bool fp32_out, bool gated, cudaStream_t stream) {
  if (gated) return launch<T, T, true>(p, stream);
  if (fp32_out) return launch<T, float, false>(p, stream);
  launch<T, T, false>(p, stream);
}

}  // namespace

SkinnyPlan plan_skinny_linear(int columns, int inputs, bool gated, int multiprocessors) {
  SkinnyPlan plan{};
  const int tile = gated ? 8 : 16;
  plan.tiles = divide_up(columns, multiprocessors) <= tile ? 1 : 2;
  spread(plan, columns, multiprocessors, plan.tiles * tile);
  plan.ahead = kAheadBytes / (inputs * 2);
  return plan;
}

SkinnyPlan plan_skinny_linear(int columns, int inputs, bool gated) {
  return plan_skinny_linear(columns, inputs, gated, num_multiprocessors());
}

void launch_skinny_linear(const SkinnyParams& params, Dtype dtype, Dtype out, bool gated,
                          cudaStream_t stream) {
  if (params.rows == 0 || params.columns == 0) return;
  const bool fp32_out = out == Dtype::kF32;
  if (dtype == Dtype::kF16) return launch<half_t>(params, fp32_out, gated, stream);
  launch<bf16>(params, fp32_out, gated, stream);
}

}  // namespace dendrite
