// Parts of skinny_linear: which weight rows a lane reads, the multiplication of a chunk of inputs,
// and the order of the sums.
//
// out^T = W x^T by mma_m16n8k16: A is 16 rows of the weight, B is 8 rows of x. A dot product does
// not care in which order its inputs come, as long as both sides agree: lane (g, t) holds inputs
// 8t to 8t + 7 of a chunk of 32, of weight rows g and g + 8 and of row g of x, 16 bytes each as they
// lie in memory, and gives words 0 and 1 to a first MMA and words 2 and 3 to a second. So weights
// and x go from memory to the tensor cores without a shuffle, and (where a lane reads only what it
// copied itself) without a barrier.
//
// A row of out has the same bits for every number of rows, every plan and whatever its neighbours
// hold: sums are ordered as skinny_linear_params.h says, everywhere.
#pragma once

#include "elementwise.cuh"
#include "prefetch.cuh"
#include "skinny_linear_params.h"

namespace dendrite {

// First chunk of a slice; slice kSkinnySlices begins where the inputs end.
DENDRITE_HOST_DEVICE int skinny_slice_begin(int inputs, int slice) {
  constexpr int kChunks = kSkinnyBlock / kSkinnyChunk;
  const int blocks = (inputs + kSkinnyBlock - 1) / kSkinnyBlock;
  return blocks * slice / kSkinnySlices * kChunks;
}

// An MMA tile of 16 weight rows gives 16 columns of out; gated, its halves are the gates and the
// ups of 8 columns.
template <bool kGated>
struct SkinnyTile {
  static constexpr int kColumns = kGated ? 8 : 16;

  DENDRITE_DEVICE static int column(int tile, int half, int g) {
    return kGated ? tile * 8 + g : tile * 16 + half * 8 + g;
  }
  // Rows of the weight between column 0, half 0 and the row of lane 0 at (tile, half).
  DENDRITE_DEVICE static int row(int tile, int half, int columns) {
    return kGated ? tile * 8 + half * columns : tile * 16 + half * 8;
  }
};

// acc[tile][group] += chunk of weight rows x chunk of rows of x.
template <class T, int kTiles, int kGroups>
DENDRITE_DEVICE void skinny_multiply(float (&acc)[kTiles][kGroups][4], const uint4 (&w)[kTiles][2],
                                     const uint4 (&x)[kGroups]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      mma_m16n8k16<T>(acc[tile][group], {w[tile][0].x, w[tile][1].x, w[tile][0].y, w[tile][1].y},
                      {x[group].x, x[group].y});
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      mma_m16n8k16<T>(acc[tile][group], {w[tile][0].z, w[tile][1].z, w[tile][0].w, w[tile][1].w},
                      {x[group].z, x[group].w});
}

// The value of out from the sums of one weight row, or from those of a gate and its up. Gate and
// up are rounded to T first, so that gating here and in silu_mul give the same bits.
template <class T>
DENDRITE_DEVICE float skinny_finish(float sum, const void* bias, int column) {
  return bias == nullptr ? sum : sum + to_float(static_cast<const T*>(bias)[column]);
}
template <class T>
DENDRITE_DEVICE float skinny_gate(float gate, float up) {
  return silu(to_float(from_float<T>(gate))) * to_float(from_float<T>(up));
}

template <class Out>
DENDRITE_DEVICE void skinny_put(const SkinnyParams& p, int row, int column, float value) {
  static_cast<Out*>(p.out)[int64_t(row) * p.columns + column] = from_float<Out>(value);
}

// Asks for inputs [begin, end) of p.plan.ahead weight rows of a block into L2: of the columns from
// first_column on; gated, of gates and ups in turn. Few lanes of many warps: they take turns.
template <class T, bool kGated>
DENDRITE_DEVICE void skinny_prefetch(const SkinnyParams& p, int first_column, int last_column,
                                     int begin, int end) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  for (int i = lane * kSkinnyWarps + warp; i < p.plan.ahead; i += kSkinnyThreads) {
    const int column = first_column + (kGated ? i / 2 : i);
    if (column >= last_column || begin >= end) return;
    const int64_t row = column + (kGated && i % 2 == 1 ? p.columns : 0);
    prefetch_l2(static_cast<const T*>(p.weight) + row * p.inputs + begin,
                (end - begin) * int(sizeof(T)));
  }
}

}  // namespace dendrite
