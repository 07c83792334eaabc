// First pass over a row: largest and smallest processed logit, the most likely token, whether all
// is finite, and the log of the sum of exp of the raw logits. Greedy rows need nothing else.
#pragma once

#include "sampling_shared.cuh"

namespace dendrite::sampling {

// What one thread found. `top` and `top_id` are those of its warp.
struct Scan {
  float top = -kInfinity, lowest = kInfinity;
  int top_id = 0, live = 0;
  float raw_lowest = kInfinity;  // of the raw logits; -inf where one of them was not finite
};

// 512 logits, 16 a lane: four at a time (c), four times (j). A whole tile starts at a multiple of 16
// bytes and is held in registers; others (the end of a row, rows that are not aligned) are read
// anew each time, and have the tile's first logit in the place of what is beyond the row.
template <bool kWhole>
struct TileValues {
  const Row& row;
  int first;
  float v[kWhole ? 16 : 1];

  DENDRITE_DEVICE TileValues(const Row& r, int first_token) : row(r), first(first_token) {
    if constexpr (kWhole) {
      const float* x = row.logits + token(0, 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint4 data = load_global_16(x + 128 * j);
        v[4 * j] = bits_float(data.x);
        v[4 * j + 1] = bits_float(data.y);
        v[4 * j + 2] = bits_float(data.z);
        v[4 * j + 3] = bits_float(data.w);
      }
    }
  }
  DENDRITE_DEVICE int token(int j, int c) const {
    return first + 128 * j + int(threadIdx.x % 32) * 4 + c;
  }
  DENDRITE_DEVICE bool inside(int j, int c) const { return kWhole || token(j, c) < row.vocab; }
  DENDRITE_DEVICE float operator()(int j, int c) const {
    return kWhole ? v[4 * j + c] : row.logits[inside(j, c) ? token(j, c) : first];
  }
  // Calls function(j, c) for j = 0 .. 3 and, inside of that, c = 0 .. 3.
  template <class Function>
  DENDRITE_DEVICE void for_each(Function&& function) const {
#pragma unroll(kWhole ? 4 : 1)
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) function(j, c);
    }
  }
};

// Bit 4 j + c: the token is in the row and its logit is the processed one.
template <bool kEdited, bool kWhole>
DENDRITE_DEVICE uint32_t plain_tokens(const TileValues<kWhole>& values) {
  [[maybe_unused]] const Row& row = values.row;
  if constexpr (kWhole && !kEdited) {
    return 0xffffu;
  } else {
    uint32_t plain = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = values.token(j, 0), at = token - row.begin;
      const int left = kWhole ? 4 : min(max(row.vocab - token, 0), 4);
      uint32_t bits = (1u << left) - 1u;
      if (kEdited && row.edited && left > 0) bits &= row.bitmap[at >> 5] >> (at & 31);
      plain |= bits << 4 * j;
    }
    return plain;
  }
}

template <bool kEdited, bool kWhole>
DENDRITE_DEVICE TileSum scan_tile(const Row& row, int first, Scan& mine) {
  TileValues<kWhole> values(row, first);
  float top = values(0, 0), sums[4] = {};
  values.for_each([&](int j, int c) {
    top = max(top, values(j, c));
    mine.raw_lowest = min(mine.raw_lowest, values(j, c));
  });
  top = warp_max(top);
  values.for_each([&](int j, int c) {
    const float e = exp2_fast((values(j, c) - top) * kLog2e);
    if (values.inside(j, c)) sums[c] += e;
  });
  const double sum = warp_sum(double((sums[0] + sums[1]) + (sums[2] + sums[3])));
  if (!(sum < double(kInfinity))) mine.raw_lowest = -kInfinity;  // inf - inf and NaN - x are NaN

  const uint32_t plain = plain_tokens<kEdited>(values);
  if (kEdited) mine.live += popcount(plain);
  // NaN where the logit is not the processed one: no maximum, no minimum and equal to nothing.
  const auto processed = [&](int j, int c) {
    return plain >> (4 * j + c) & 1u ? values(j, c) : bits_float(0x7fc00000u);
  };
  if constexpr (kWhole && kEdited)
    values.for_each([&](int j, int c) { values.v[4 * j + c] = processed(j, c); });
  float best = -kInfinity;
  const auto value = [&](int j, int c) { return kWhole ? values(j, c) : processed(j, c); };
  values.for_each([&](int j, int c) {
    if (!kEdited) return;
    best = max(best, value(j, c));
    mine.lowest = min(mine.lowest, value(j, c));
  });
  best = kEdited ? warp_max(best) : top;
  if (best > mine.top) {  // in the whole warp; its tiles come in ascending order
    int id = row.vocab;
    values.for_each([&](int j, int c) {
      if (value(j, c) == best) id = min(id, values.token(j, c));
    });
    mine.top = best;
    mine.top_id = -warp_max(-id);
  }
  return {sum, top, 0.0f};
}

template <bool kEdited>
DENDRITE_DEVICE Scan scan_tiles(const Row& row, TileSum* tiles) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const bool aligned = reinterpret_cast<uintptr_t>(row.logits) % 16 == 0;
  Scan mine;
  for (int first = row.begin + int(threadIdx.x / 32) * kTile; first < row.end;
       first += warps * kTile) {
    const TileSum sum = aligned && first + kTile <= row.end
                            ? scan_tile<kEdited, true>(row, first, mine)
                            : scan_tile<true, false>(row, first, mine);
    if (lane == 0) tiles[first / kTile] = sum;
  }
  return mine;
}

// Statistics of [begin, end), the same in every thread, and the sums of its tiles. Without raw_max
// and log_sum. Ends with a barrier.
DENDRITE_DEVICE RowState scan_row(const Row& row, TileSum* tiles, void* scratch) {
  Scan mine = row.edited ? scan_tiles<true>(row, tiles) : scan_tiles<false>(row, tiles);
  bool bad = mine.raw_lowest == -kInfinity;
  uint64_t best = mine.top > -kInfinity
                      ? uint64_t(order_of(mine.top)) << 32 | ~uint32_t(mine.top_id)
                      : 0;
  if (!row.edited) {
    mine.lowest = mine.raw_lowest;
  } else {
    for_each_edit(row, [&](float value, int id) {
      bad |= !(value < kInfinity);
      if (!(value > -kInfinity)) return;
      const uint64_t key = uint64_t(order_of(value)) << 32 | ~uint32_t(id);
      best = best > key ? best : key;
      mine.lowest = min(mine.lowest, value);
      ++mine.live;
    });
  }
  RowState state{};
  state.bad = block_reduce(bad ? 1 : 0, scratch, Largest());
  state.best = block_reduce(best, scratch, Largest());
  state.lowest = -block_reduce(-mine.lowest, scratch, Largest());
  state.live = row.edited ? block_reduce(mine.live, scratch, Sum()) : row.end - row.begin;
  return state;
}

// raw_max and log_sum from the sums of all tiles, in the first warp, in a fixed order.
DENDRITE_DEVICE void add_tiles(const TileSum* tiles, int count, RowState& state) {
  const int lane = threadIdx.x % 32;
  float top = -kInfinity;
  for (int i = lane; i < count; i += 32) top = max(top, tiles[i].max);
  top = warp_max(top);
  double sum = 0.0;
  for (int i = lane; i < count; i += 32)
    sum += tiles[i].sum * double(exp2_fast((tiles[i].max - top) * kLog2e));
  state.raw_max = top;
  state.log_sum = log(warp_sum(sum));
}

DENDRITE_DEVICE float logprob_of(const Row& row, const RowState& state, int id) {
  return float(double(row.logits[id]) - double(state.raw_max) - state.log_sum);
}

}  // namespace dendrite::sampling
