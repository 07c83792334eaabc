// out = x weight^T for up to 128 rows on Hopper, at the speed at which the weight can be read.
//
// The weight is the left operand of the warpgroup products, so that a few rows of x waste nothing:
// out^T = W x^T. A block owns 64 weight rows for each of its warpgroups and a part of the inputs;
// a warp brings panels of 64 inputs of both by bulk copies, several stages deep. It asks for the
// first panels of the weight before the kernel ahead has ended: a weight never changes. Blocks that
// share a tile's inputs form a cluster and add their sums through each other's shared memory.
//
// A sum's order depends on the inputs and on plan.splits alone, not on the number of rows.
#pragma once

#include "cluster.cuh"
#include "elementwise.cuh"
#include "stream_linear_params.h"
#include "tma.cuh"
#include "wgmma_panels.cuh"

namespace dendrite {

template <int kRows, int kGroups>
struct StreamShared {
  static constexpr int kWeightBytes = kGroups * kPanelBytes;
  static constexpr int kStageBytes = kWeightBytes + kRows * 128;
  static constexpr int kStages = 104 * 1024 / kStageBytes;  // two blocks fit into a multiprocessor
  static constexpr int kColumns = 64 * kGroups;
  static constexpr int kStride = kColumns + 4;  // floats of a row of sums: stores hit all banks
  static constexpr int kSumsBytes = kRows * kStride * int(sizeof(float));
  static constexpr int kBarriersAt = kStages * kStageBytes;
  static constexpr int kBytes = kBarriersAt + 2 * kStages * kMbarrierBytes + 1024;
  static_assert(kSumsBytes <= kBarriersAt && kStages >= 2);

  char* smem;
  DENDRITE_DEVICE SharedAddress weights(int t) const {
    return shared_address(smem) + t % kStages * kStageBytes;
  }
  DENDRITE_DEVICE SharedAddress x(int t) const { return weights(t) + kWeightBytes; }
  DENDRITE_DEVICE float* sums() const { return reinterpret_cast<float*>(smem); }  // at the end
  DENDRITE_DEVICE SharedAddress full(int t) const {
    return shared_address(smem) + kBarriersAt + t % kStages * 2 * kMbarrierBytes;
  }
  DENDRITE_DEVICE SharedAddress empty(int t) const { return full(t) + kMbarrierBytes; }
  static DENDRITE_DEVICE int parity(int t) { return t / kStages & 1; }

  DENDRITE_DEVICE void start_barriers() const {
    for (int t = 0; t < kStages; ++t) {
      mbarrier_init(full(t), 1);
      mbarrier_init(empty(t), 4 * kGroups);  // one arrival of each warp
    }
    mbarrier_init_done();
  }
};

// Columns of out that a block computes, and weight rows of a box of its copies. Gated, half of a
// block's weight rows are gates and half are ups.
DENDRITE_HOST_DEVICE constexpr int stream_columns(int groups, bool gated) {
  return groups * (gated ? 32 : 64);
}
DENDRITE_HOST_DEVICE constexpr int stream_box_rows(int groups, bool gated) {
  return gated ? groups * 32 : 64;
}

// What a block works on: steps [begin, end) of weight rows from `column` on.
struct StreamPart {
  int rank, column, begin, end;

  DENDRITE_DEVICE StreamPart(const StreamParams& p, int columns)
      : rank(int(blockIdx.x) % p.plan.splits), column(int(blockIdx.x) / p.plan.splits * columns),
        begin(p.steps * rank / p.plan.splits), end(p.steps * (rank + 1) / p.plan.splits) {}
};

// One thread fills the stages.
template <int kRows, int kGroups, bool kGated>
DENDRITE_DEVICE void stream_produce(const StreamParams& p, const StreamPart& part,
                                    const StreamShared<kRows, kGroups>& shared,
                                    const CUtensorMap* weights, const CUtensorMap* x) {
  using Shared = StreamShared<kRows, kGroups>;
  constexpr int kBoxBytes = stream_box_rows(kGroups, kGated) * 128;
  const int count = part.end - part.begin, ahead = min(count, Shared::kStages);
  const auto ask_weights = [&](int t) {
    mbarrier_arrive_and_expect(shared.full(t), Shared::kStageBytes);
#pragma unroll
    for (int i = 0; i < (kGated ? 2 : kGroups); ++i)  // gates, then ups
      load_box(shared.weights(t) + i * kBoxBytes, weights, shared.full(t), 0,
               part.column + i * (kGated ? p.columns : 64), part.begin + t);
  };
  for (int t = 0; t < ahead; ++t) ask_weights(t);
  grid_dependency_wait();
  for (int t = 0; t < ahead; ++t) load_box(shared.x(t), x, shared.full(t), 0, 0, part.begin + t);
  for (int t = ahead; t < count; ++t) {
    mbarrier_wait(shared.empty(t), Shared::parity(t) ^ 1);
    ask_weights(t);
    load_box(shared.x(t), x, shared.full(t), 0, 0, part.begin + t);
  }
}

// A warpgroup multiplies its 64 weight rows and leaves the sums in shared memory, [rows][columns].
template <class T, int kRows, int kGroups>
DENDRITE_DEVICE void stream_consume(const StreamPart& part,
                                    const StreamShared<kRows, kGroups>& shared) {
  using Shared = StreamShared<kRows, kGroups>;
  const int group = int(threadIdx.x) / 128, lane = int(threadIdx.x) % 32;
  const auto release = [&](int t) {
    sync_warp();
    if (lane == 0) mbarrier_arrive(shared.empty(t));
  };
  float acc[kRows / 8][4];
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.f;
  const int count = part.end - part.begin;
  for (int t = 0; t < count; ++t) {
    mbarrier_wait(shared.full(t), Shared::parity(t));
    const uint64_t a = k_major(shared.weights(t) + group * kPanelBytes), b = k_major(shared.x(t));
    hold(acc);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_panels<T>(acc, advance(a, k * 32), advance(b, k * 32), true);
    wgmma_commit();
    hold(acc);
    if (t == 0) continue;
    wgmma_wait<1>();
    release(t - 1);
  }
  wgmma_wait<0>();
  hold(acc);
  sync_threads<128 * kGroups>(1);  // nobody reads the stages any more
  float* const sums = shared.sums() + group * 64 + int(threadIdx.x) % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
    for (int c = 0; c < 4; ++c)
      sums[(n * 8 + lane % 4 * 2 + c % 2) * Shared::kStride + c / 2 * 8] = acc[n][c];
}

// Four sums of the tile, those of the cluster's blocks added in the order of their parts.
DENDRITE_DEVICE float4 stream_sum(const float* sums, int splits) {
  if (splits == 1) return *reinterpret_cast<const float4*>(sums);
  float4 total = load_cluster_16(sums, 0);
  for (int rank = 1; rank < splits; ++rank) {
    const float4 more = load_cluster_16(sums, rank);
    total.x += more.x;
    total.y += more.y;
    total.z += more.z;
    total.w += more.w;
  }
  return total;
}

// Each block of a cluster writes a part of the tile.
template <class T, class Out, int kRows, int kGroups, bool kGated>
DENDRITE_DEVICE void stream_write(const StreamParams& p, const StreamPart& part,
                                  const StreamShared<kRows, kGroups>& shared) {
  using Shared = StreamShared<kRows, kGroups>;
  constexpr int kColumns = stream_columns(kGroups, kGated), kQuads = kColumns / 4;
  constexpr int kThreads = 128 * kGroups;
  const int splits = p.plan.splits;
  for (int i = part.rank * kThreads + int(threadIdx.x); i < p.rows * kQuads;
       i += splits * kThreads) {
    const int row = i / kQuads, at = i % kQuads * 4, column = part.column + at;
    if (column >= p.columns) continue;
    const float* sums = shared.sums() + row * Shared::kStride + at;
    const float4 sum = stream_sum(sums, splits);
    float values[4] = {sum.x, sum.y, sum.z, sum.w};
    if constexpr (kGated) {
      const float4 ups = stream_sum(sums + kColumns, splits);
      const float up[4] = {ups.x, ups.y, ups.z, ups.w};
      // Rounded as the product alone would be, so that silu_mul behind it gives the same bits.
#pragma unroll
      for (int c = 0; c < 4; ++c)
        values[c] = silu(to_float(from_float<T>(values[c]))) * to_float(from_float<T>(up[c]));
    } else if (p.bias != nullptr) {
#pragma unroll
      for (int c = 0; c < 4; ++c) values[c] += to_float(static_cast<const T*>(p.bias)[column + c]);
    }
    store_floats<4>(static_cast<Out*>(p.out) + int64_t(row) * p.columns + column, values);
  }
}

// `weights` and `x`: [inputs / 64][rows][64], in boxes of a panel of stream_box_rows and of kRows rows.
template <class T, class Out, int kRows, int kGroups, bool kGated>
__global__ void __launch_bounds__(128 * kGroups + 32, 2)
stream_linear_kernel(const __grid_constant__ StreamParams p,
                     const __grid_constant__ CUtensorMap weights,
                     const __grid_constant__ CUtensorMap x) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kConsumers = 128 * kGroups;
  extern __shared__ char raw[];
  const StreamShared<kRows, kGroups> shared{raw + (1024 - shared_address(raw) % 1024) % 1024};
  const StreamPart part(p, stream_columns(kGroups, kGated));
  if (threadIdx.x == kConsumers) {
    prefetch_tensor_map(&weights);
    prefetch_tensor_map(&x);
    shared.start_barriers();
  }
  sync_block();
  grid_dependency_launch();
  if (threadIdx.x < kConsumers)
    stream_consume<T>(part, shared);
  else if (threadIdx.x == kConsumers)
    stream_produce<kRows, kGroups, kGated>(p, part, shared, &weights, &x);
  sync_warp();
  if (p.plan.splits > 1)
    sync_cluster();
  else
    sync_block();
  if (threadIdx.x < kConsumers) stream_write<T, Out, kRows, kGroups, kGated>(p, part, shared);
  if (p.plan.splits > 1) sync_cluster();  // others read our sums
#else
  __trap();  // built without sm_90a: better no result than a wrong one
#endif
}

}  // namespace dendrite
