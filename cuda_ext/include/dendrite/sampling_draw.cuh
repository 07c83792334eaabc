// From the gathered candidates to the token: sort, running weights, and the filters one after the
// other, each of which keeps a prefix of the order.
#pragma once

#include "sampling_window.cuh"

namespace dendrite::sampling {

// Sorts keys[0, n) ascending; n <= kCandidates, and keys has room up to the next power of two.
// Bitonic: exchanges at a distance of up to 32 stay in the 64 keys of a warp.
DENDRITE_DEVICE void sort_keys(uint64_t* keys, int n) {
  int size = 64;
  while (size < n) size *= 2;
  for (int i = n + int(threadIdx.x); i < size; i += blockDim.x) keys[i] = ~uint64_t(0);
  sync_block();
  for (int run = 2; run <= size; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
        const int lo = 2 * i - (i & (distance - 1)), hi = lo + distance;
        const uint64_t a = keys[lo], b = keys[hi];
        if ((a > b) == ((lo & run) == 0)) {
          keys[lo] = b;
          keys[hi] = a;
        }
      }
      if (distance > 32 || (distance == 1 && run >= 64))
        sync_block();
      else
        sync_warp();
    }
  }
  sync_block();
}

struct Draw {
  const Row& row;
  Shared& shared;
  Distance distance;

  // Sorts the gathered tokens, lays out the windows and makes running weights.
  DENDRITE_DEVICE void prepare() const {
    const int n = min(shared.num_candidates, kCandidates);
    sort_keys(shared.keys, n);
    const int per_thread = (n + int(blockDim.x) - 1) / int(blockDim.x);
    const int first = threadIdx.x * per_thread, last = min(first + per_thread, n);
    int unused = 0;
    uint64_t mass = 0;
    for (int i = first; i < last; ++i) mass += weight(i);
    block_scan(unused, mass, shared.scratch);
    for (int i = first; i < last; ++i) shared.sums[i] = mass += weight(i);
    sync_block();
    if (threadIdx.x == 0) {
      int start = 0;
      for (int i = 0; i < shared.num_windows; ++i) {
        Window& w = shared.windows[i];
        w.start = start;
        w.before -= start > 0 ? shared.sums[start - 1] : 0;  // sums[j] + before: running weight
        start += w.count;
      }
      shared.sorted = 1;
    }
    sync_block();
  }

  DENDRITE_DEVICE uint64_t weight(int i) const {
    return whole(weight_at(distance(value_of_key(shared.keys[i]))));
  }

  // Place of the token of rank `target`, or at which the running weight reaches `target`.
  DENDRITE_DEVICE Place find(bool by_mass, uint64_t target) const {
    if (shared.sorted) {
      if (threadIdx.x < 32) look(by_mass, target);
      sync_block();
      const Place found = shared.place;
      sync_block();
      if (found.rank >= 0) return found;
    }
    // What follows needs the memory of the windows.
    if (threadIdx.x == 0 && shared.sorted) shared.sorted = 0;
    return select_place(row, shared, distance, by_mass, target);
  }

  // In the first warp: looks into the windows.
  DENDRITE_DEVICE void look(bool by_mass, uint64_t target) const {
    int at = -1, rank = -1;
    uint64_t before = 0;
    for (int i = 0; i < shared.num_windows && at < 0; ++i) {
      const Window& w = shared.windows[i];
      before = w.before;
      if (by_mass) {
        const uint64_t last = before + shared.sums[w.start + w.count - 1];
        const uint64_t earlier = before + (w.start > 0 ? shared.sums[w.start - 1] : 0);
        if (target <= earlier) break;
        if (target > last) continue;
        at = w.start + count_below(shared.sums + w.start, w.count, target - before);
      } else {
        if (target < uint64_t(w.before_count)) break;
        if (target >= uint64_t(w.before_count + w.count)) continue;
        at = w.start + int(target) - w.before_count;
      }
      rank = w.before_count + at - w.start;
    }
    if (threadIdx.x == 0)
      shared.place = {at < 0 ? 0 : shared.keys[at], at < 0 ? 0 : shared.sums[at] + before, rank};
  }

  // shared.masses where every token is a candidate. Ends with a barrier.
  DENDRITE_DEVICE void add_candidates(int live) const {
    int kept = 0;
    for (int i = threadIdx.x; i < live; i += blockDim.x)
      kept += distance(value_of_key(shared.keys[i])) <= row.record->min_p_distance ? 1 : 0;
    kept = block_reduce(kept, shared.scratch, Sum());
    if (threadIdx.x == 0)
      shared.masses = {shared.sums[live - 1], kept > 0 ? shared.sums[kept - 1] : 0, kept, 0.0f};
    sync_block();
  }

  // The token, in every thread, of `live` tokens that are not banned. Complete: each of them is a
  // candidate; else shared.masses are those of all tokens.
  DENDRITE_DEVICE int token(int live, bool complete) const {
    const Record& record = *row.record;
    const int counted = complete ? live : shared.histogram[kBins - 1];
    prepare();
    if (complete) add_candidates(live);
    int kept = live;
    uint64_t mass = shared.masses.total;
    Place place{0, 0, 0};
#pragma unroll 1
    for (int step = 0; step < 3; ++step) {  // top-k; top-p; min-p and the draw
      uint64_t target = 0;
      if (step == 0) {
        if (record.top_k <= 0 || record.top_k >= kept) continue;
        kept = record.top_k;
        if (kept > counted) continue;  // what the histogram doesn't count weighs nothing
        target = uint64_t(kept - 1);
      } else if (step == 1) {
        if (!(record.top_p < 1.0f)) continue;
        const double wanted = ceil(double(record.top_p) * double(mass));
        target = wanted > 1.0 ? uint64_t(wanted) : 1;
        target = target < mass ? target : mass;
      } else {
        if (record.min_p_distance < kInfinity && shared.masses.near_max_count < kept)
          mass = shared.masses.near_max;
        const uint64_t passed = uint64_t(uniform_of(record) * double(mass));
        target = (passed < mass ? passed : mass - 1) + 1;
      }
      place = find(step > 0, target);
      kept = place.rank + 1;
      mass = place.mass;
    }
    return id_of_key(place.key);
  }
};

}  // namespace dendrite::sampling
