#include "stream_linear.h"

#include <algorithm>

#include "launch.h"
#ifndef DENDRITE_EMULATE
#include "dendrite/stream_linear.cuh"
#include "tree_attention_maps.h"
#endif

namespace dendrite {
namespace {

constexpr int kMinSteps = 4;  // of a block: fewer don't hide how long a copy takes

int divide_up(int value, int by) { return (value + by - 1) / by; }

int tiles_of(const StreamShape& shape, int groups) {
  return divide_up(shape.columns, kStreamPanel * groups / (shape.gated ? 2 : 1));
}

// Blocks along the inputs, where `places` blocks are wanted.
int splits_of(const StreamShape& shape, int groups, int places) {
  const int steps = shape.inputs / kStreamPanel;
  const int most = std::min({places / tiles_of(shape, groups), steps / kMinSteps, kStreamMaxSplits});
  return std::max(most, 1);
}

#ifndef DENDRITE_EMULATE
struct Operands {
  const void *x, *weight;
};

template <class T, class Out, int kRows, int kGroups, bool kGated>
void launch(const StreamParams& p, const StreamShape& shape, const Operands& operands,
            cudaStream_t stream) {
  const int panels = shape.inputs / kStreamPanel;
  const int weight_rows = shape.gated ? 2 * shape.columns : shape.columns;
  launch_clusters(stream_linear_kernel<T, Out, kRows, kGroups, kGated>, p.plan.splits,
                  dim3(tiles_of(shape, kGroups) * p.plan.splits), dim3(128 * kGroups + 32),
                  StreamShared<kRows, kGroups>::kBytes, stream, true, p,
                  map_of_panels(operands.weight, weight_rows, panels,
                                stream_box_rows(kGroups, kGated), 1),
                  map_of_panels(operands.x, shape.rows, panels, kRows, 1));
}

template <class T, class Out, int kGroups, bool kGated>
void launch(const StreamParams& p, const StreamShape& shape, const Operands& operands,
            cudaStream_t stream) {
  if (p.rows <= 8) return launch<T, Out, 8, kGroups, kGated>(p, shape, operands, stream);
  if (p.rows <= 16) return launch<T, Out, 16, kGroups, kGated>(p, shape, operands, stream);
  if (p.rows <= 32) return launch<T, Out, 32, kGroups, kGated>(p, shape, operands, stream);
  if (p.rows <= 64) return launch<T, Out, 64, kGroups, kGated>(p, shape, operands, stream);
  launch<T, Out, 128, kGroups, kGated>(p, shape, operands, stream);
}

template <class T>
void launch(const StreamParams& p, const StreamShape& shape, const Operands& operands,
            cudaStream_t stream) {
  if (shape.gated) {
    if (p.plan.groups == 1) return launch<T, T, 1, true>(p, shape, operands, stream);
    return launch<T, T, 2, true>(p, shape, operands, stream);
  }
  if (shape.out == Dtype::kF32) {
    if (p.plan.groups == 1) return launch<T, float, 1, false>(p, shape, operands, stream);
    return launch<T, float, 2, false>(p, shape, operands, stream);
  }
  if (p.plan.groups == 1) return launch<T, T, 1, false>(p, shape, operands, stream);
  launch<T, T, 2, false>(p, shape, operands, stream);
}
#endif

}  // namespace

bool stream_linear_serves() {
#ifdef DENDRITE_EMULATE
  return false;
#else
  return has_warpgroup_products();
#endif
}

// As measured on an H100: larger tiles where there are enough of them, and so many splits that one
// and a half blocks go to a multiprocessor. More and larger clusters take longer to start than they
// save.
StreamPlan plan_stream_linear(const StreamShape& shape, int multiprocessors) {
  const int places = multiprocessors * 3 / 2;
  const int groups = tiles_of(shape, 2) >= places ? 2 : 1;
  return {groups, splits_of(shape, groups, places)};
}

StreamPlan plan_stream_linear(const StreamShape& shape) {
  return plan_stream_linear(shape, num_multiprocessors());
}

void launch_stream_linear(const StreamParams& params, const StreamShape& shape, const void* x,
                          const void* weight, cudaStream_t stream) {
  if (params.rows == 0 || params.columns == 0) return;
#ifdef DENDRITE_EMULATE
  (void)shape, (void)x, (void)weight, (void)stream;
  throw std::runtime_error("stream_linear: the emulator has no warpgroup products");
#else
  if (!stream_linear_serves())
    throw std::runtime_error("stream_linear: this device has no warpgroup products (sm_90a)");
  if (shape.dtype == Dtype::kF16) return launch<half_t>(params, shape, {x, weight}, stream);
  launch<bf16>(params, shape, {x, weight}, stream);
#endif
}

}  // namespace dendrite
