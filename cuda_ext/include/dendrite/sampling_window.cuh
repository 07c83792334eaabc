// The fast way to the places in the sampling order that matter. A histogram of the distances from
// the maximum counts tokens exactly; the middle of each bin estimates its weight, and so where the
// filters cut and where the draw falls. The tokens around those places (a window each) are gathered
// and sorted, while the same pass adds up exactly what lies before each window. If a place turns
// out to be in none of them, select_place() finds it.
#pragma once

#include "sampling_select.cuh"

namespace dendrite::sampling {

// ---- second pass: histogram and masses

template <bool kEdited>
DENDRITE_DEVICE void count_bins(const Row& row, int* histogram, Distance distance, float min_p,
                                Masses& mine) {
  const float scale = mine.scale;
  const bool has_min_p = min_p < kInfinity;
  uint32_t high = 0, near_high = 0;
  int32_t low = 0, near_low = 0;
  for_each_token<kEdited, 4>(
      row,
      [&](float value, int) {
        const float d = distance(value), bin = d * scale;
        const Weight w = weight_at(d);
        high += w.high;
        low += w.low;
        if (bin < float(kBins - 1)) atomic_add(&histogram[int(bin)], 1);
        if (has_min_p && d <= min_p) {
          near_high += w.high;
          near_low += w.low;
          ++mine.near_max_count;
        }
      },
      [&] {
        mine.total += whole(high, low);
        mine.near_max += whole(near_high, near_low);
        high = near_high = 0;
        low = near_low = 0;
      });
}

DENDRITE_DEVICE void clear_histogram(Shared& shared) {
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) shared.histogram[i] = 0;
  sync_block();
}

// Of [begin, end): adds to the histogram, returns the masses in every thread. Ends with a barrier.
DENDRITE_DEVICE Masses count_row(const Row& row, Shared& shared, const RowState& state) {
  const Distance distance = distance_of(state, row.record->inverse_temperature);
  const float min_p = row.record->min_p_distance;
  Masses mine{0, 0, 0, bin_scale(state, distance, near_of(*row.record))};
  if (row.edited)
    count_bins<true>(row, shared.histogram, distance, min_p, mine);
  else
    count_bins<false>(row, shared.histogram, distance, min_p, mine);
  mine.total = block_reduce(mine.total, shared.scratch, Sum());
  mine.near_max = block_reduce(mine.near_max, shared.scratch, Sum());
  mine.near_max_count = block_reduce(mine.near_max_count, shared.scratch, Sum());
  return mine;
}

// ---- the plan: windows around the estimated places

// Makes running counts of the histogram, and running estimated weights in `sums`: a token weighs
// what the middle of its bin does, but the first, whose distance is 0.
DENDRITE_DEVICE void accumulate_histogram(Shared& shared, float scale) {
  const int per_thread = kBins / int(blockDim.x), first = threadIdx.x * per_thread;
  const float width = scale > 0.0f ? 1.0f / scale : 0.0f;
  const auto estimate = [&](int bin, int n) {
    const uint64_t each = whole(weight_at((float(bin) + 0.5f) * width));
    return uint64_t(n) * each + (bin == 0 ? whole(weight_at(0.0f)) - each : 0);
  };
  int count = 0;
  uint64_t mass = 0;
  for (int i = first; i < first + per_thread; ++i) {
    const int n = shared.histogram[i];
    count += n;
    mass += estimate(i, n);
  }
  block_scan(count, mass, shared.scratch);
  for (int i = first; i < first + per_thread; ++i) {
    const int n = shared.histogram[i];
    shared.histogram[i] = count += n;
    shared.sums[i] = mass += estimate(i, n);
  }
  sync_block();
}

// Of the first warp. Estimates, in units of the histogram.
struct Planner {
  Shared& shared;

  DENDRITE_DEVICE int count_to(int bin) const { return bin < 0 ? 0 : shared.histogram[bin]; }
  DENDRITE_DEVICE double mass_to(int bin) const {
    return bin < 0 ? 0.0 : double(shared.sums[bin]);
  }
  DENDRITE_DEVICE int bin_of_rank(int rank) const {
    return count_below(shared.histogram, kBins, rank + 1);
  }
  DENDRITE_DEVICE double mass_of_first(int tokens) const {
    const int bin = bin_of_rank(tokens - 1);
    const double before = mass_to(bin - 1), own = mass_to(bin) - before;
    const int first = count_to(bin - 1);
    return before + own * (tokens - first) / (count_to(bin) - first);
  }
  // Rank of the token at which the running weight reaches `mass`, at most the last one counted.
  DENDRITE_DEVICE int rank_of_mass(double mass) const {
    const int bin = count_below(shared.sums, kBins, uint64_t(mass));
    if (bin >= kBins) return count_to(kBins - 1) - 1;
    const double before = mass_to(bin - 1), own = mass_to(bin) - before;
    const int first = count_to(bin - 1), n = count_to(bin) - first;
    const int at = own > 0.0 ? int((mass - before) / own * n) : 0;
    return first + max(0, min(at, n - 1));
  }

  // Adds the bins that hold the ranks around `rank`, or its own bin alone where those are too full.
  DENDRITE_DEVICE void add_window(int rank, int reach) const {
    const int most = count_to(kBins - 1) - 1;
    const int own = bin_of_rank(rank);
    const int lo = bin_of_rank(max(rank - reach, 0)), hi = bin_of_rank(min(rank + reach, most));
    if (threadIdx.x == 0 && !insert(lo, hi)) insert(own, own);
    sync_warp();
  }

  // Unites [lo, hi] with the windows that it touches; false where candidates would be too many.
  DENDRITE_DEVICE bool insert(int lo, int hi) const {
    Window* windows = shared.windows;
    int others = 0, kept = 0;
    for (int i = 0; i < shared.num_windows; ++i) {
      if (lo <= windows[i].hi + 1 && windows[i].lo <= hi + 1) {
        lo = min(lo, windows[i].lo);
        hi = max(hi, windows[i].hi);
      } else {
        others += windows[i].count;
      }
    }
    const int before = count_to(lo - 1), count = count_to(hi) - before;
    if (others + count > kCandidates) return false;
    for (int i = 0; i < shared.num_windows; ++i)
      if (windows[i].hi < lo || windows[i].lo > hi) windows[kept++] = windows[i];
    shared.num_windows = kept + 1;
    for (; kept > 0 && windows[kept - 1].lo > lo; --kept) windows[kept] = windows[kept - 1];
    windows[kept] = {lo, hi, float(lo), float(hi + 1), 0, count, before, 0};
    return true;
  }
};

// Decides which bins to gather. Every thread of the block; ends with a barrier.
DENDRITE_DEVICE void plan_windows(const Row& row, Shared& shared, const Masses& masses) {
  accumulate_histogram(shared, masses.scale);
  if (threadIdx.x == 0) shared.num_windows = 0;
  if (threadIdx.x < 32) {
    sync_warp();
    const Record& record = *row.record;
    const Planner planner{shared};
    const int near = planner.count_to(kBins - 1);
    double mass = planner.mass_to(kBins - 1);  // as if nothing were further away
    int kept = near;
    if (record.top_k > 0 && record.top_k <= near) {
      kept = record.top_k;
      mass = planner.mass_of_first(kept);
      planner.add_window(kept - 1, 0);
    }
    if (record.top_p < 1.0f) {
      mass *= double(record.top_p);
      const int rank = planner.rank_of_mass(mass);
      kept = min(kept, rank + 1);
      planner.add_window(rank, kReach);
    }
    if (masses.near_max_count > 0 && masses.near_max_count < kept) mass = double(masses.near_max);
    planner.add_window(planner.rank_of_mass(mass * uniform_of(record)), kReach);
  }
  sync_block();
}

// Gathers everything: for rows with few tokens. The caller has made sure that they fit. Goes with a
// scale of 0: a distance that overflowed becomes NaN, which is in the window too.
DENDRITE_DEVICE void plan_all(Shared& shared, const RowState& state) {
  if (threadIdx.x == 0) {
    shared.windows[0] = {0, kBins, -1.0f, kInfinity, 0, state.live, 0, 0};
    shared.num_windows = 1;
  }
  sync_block();
}

// ---- third pass: gather

struct Before {
  uint64_t mass[kWindows];
};

// Appends a token to the candidates.
DENDRITE_DEVICE void append(Shared& shared, float value, int id) {
  const int at = atomic_add(&shared.num_candidates, 1);
  if (at < kCandidates) shared.keys[at] = key_of(value, id);
}

template <bool kEdited, bool kSums>
DENDRITE_DEVICE void gather_tokens(const Row& row, Shared& shared, Distance distance, float scale,
                                   Before& mine) {
  float lo[kWindows], hi[kWindows];
  uint32_t high[kWindows] = {};
  int32_t low[kWindows] = {};
#pragma unroll
  for (int i = 0; i < kWindows; ++i) {
    lo[i] = i < shared.num_windows ? shared.windows[i].lo_edge : kInfinity;
    hi[i] = i < shared.num_windows ? shared.windows[i].hi_edge : -kInfinity;
  }
  const auto visit = [&](const Four& four) {
    uint32_t inside = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float d = distance(four.x[c]), bin = d * scale;
      bool is_inside = false;
#pragma unroll
      for (int i = 0; i < kWindows; ++i) is_inside |= !(bin < lo[i]) && !(bin >= hi[i]);
      inside |= uint32_t(is_inside) << c;
      if (!kSums || (four.mask >> c & 1u) == 0) continue;
      const Weight w = weight_at(d);
#pragma unroll
      for (int i = 0; i < kWindows; ++i) {
        high[i] += bin < lo[i] ? w.high : 0u;
        low[i] += bin < lo[i] ? w.low : 0;
      }
    }
    inside &= four.mask;
#pragma unroll 1
    for (int c = 0; inside >> c != 0; ++c)
      if (inside >> c & 1u) append(shared, four.pick(c), four.id + c);
  };
  const auto group = [&] {
    if constexpr (kSums) {
#pragma unroll
      for (int i = 0; i < kWindows; ++i) {
        mine.mass[i] += whole(high[i], low[i]);
        high[i] = 0;
        low[i] = 0;
      }
    }
  };
  for_each_four<kEdited, 4>(row, visit, group);
  if (!kEdited) return;
  for_each_edit(row, [&](float value, int id) {
    if (value > -kInfinity) visit(Four{{value, value, value, value}, 1u, id});
    group();
  });
}

// Appends the tokens of [begin, end) that are in a window to shared.keys, and returns the weights
// before each window in every thread. Ends with a barrier.
DENDRITE_DEVICE Before gather_row(const Row& row, Shared& shared, Distance distance, float scale) {
  if (threadIdx.x == 0) {
    shared.num_candidates = 0;
    shared.sorted = 0;
  }
  sync_block();
  const int windows = shared.num_windows;
  const bool sums = windows > 0 && shared.windows[windows - 1].lo > 0;
  Before mine{};
  if (row.edited)
    sums ? gather_tokens<true, true>(row, shared, distance, scale, mine)
         : gather_tokens<true, false>(row, shared, distance, scale, mine);
  else
    sums ? gather_tokens<false, true>(row, shared, distance, scale, mine)
         : gather_tokens<false, false>(row, shared, distance, scale, mine);
#pragma unroll
  for (int i = 0; i < kWindows; ++i)
    if (sums && i < windows) mine.mass[i] = block_reduce(mine.mass[i], shared.scratch, Sum());
  sync_block();
  return mine;
}

}  // namespace dendrite::sampling
