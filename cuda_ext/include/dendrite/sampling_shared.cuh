// What the threads of a block share while they work on a row, and how they add it up.
#pragma once

#include "sampling_row.cuh"

namespace dendrite::sampling {

// A token and its place in the sampling order: tokens before it, and the weight of all tokens up to
// and with it.
struct Place {
  uint64_t key, mass;
  int rank;  // -1: not found
};

// Shared memory of a block. The first pass has no more than what stands before `histogram`, the
// second no more than what stands before `keys`; the bitmap of the row follows.
struct Shared {
  uint64_t scratch[64];
  Window windows[kWindows];
  Place place;
  Row row;
  Masses masses;
  RowState state;
  int num_windows, num_candidates, sorted, last_block;
  alignas(16) int histogram[kBins];
  uint64_t keys[kCandidates];
  uint64_t sums[kCandidates];
};
static_assert(kBins == kCandidates, "sums serves both");

// For warps, blocks and every thread of them: the reduction of `value` over the block. `scratch`
// holds one T a warp. Ends with a barrier.
template <class T, class Operation>
DENDRITE_DEVICE T block_reduce(T value, void* scratch, Operation operation) {
  T* parts = static_cast<T*>(scratch);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = operation(value, T(shfl_xor(value, mask)));
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  sync_block();
  value = parts[0];
  for (int w = 1; w < int(blockDim.x / 32); ++w) value = operation(value, parts[w]);
  sync_block();
  return value;
}
struct Sum {
  template <class T>
  DENDRITE_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  template <class T>
  DENDRITE_DEVICE T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Replaces (count, sum) of every thread by the sums over the threads before it.
DENDRITE_DEVICE void block_scan(int& count, uint64_t& sum, uint64_t* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int all = count;
  uint64_t mass = sum;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int other = shfl_up(all, delta);
    const uint64_t other_mass = shfl_up(mass, delta);
    if (lane >= delta) {
      all += other;
      mass += other_mass;
    }
  }
  if (lane == 31) {
    scratch[2 * warp] = uint64_t(all);
    scratch[2 * warp + 1] = mass;
  }
  sync_block();
  count = all - count;
  sum = mass - sum;
  for (int w = 0; w < warp; ++w) {
    count += int(scratch[2 * w]);
    sum += scratch[2 * w + 1];
  }
  sync_block();
}

DENDRITE_DEVICE int popcount(uint32_t bits) {
  bits = bits - (bits >> 1 & 0x55555555u);
  bits = (bits & 0x33333333u) + (bits >> 2 & 0x33333333u);
  return int((((bits + (bits >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
}

// For a whole warp: how many of the n <= kBins ascending values are below `bound`.
template <class T>
DENDRITE_DEVICE int count_below(const T* values, int n, T bound) {
  const int lane = threadIdx.x % 32, last = lane * 64 + 63;
  const int first = 64 * popcount(ballot(last < n && values[last < n ? last : 0] < bound));
  const int a = first + lane, b = a + 32;
  const uint32_t low = ballot(a < n && values[a < n ? a : 0] < bound);
  const uint32_t high = ballot(b < n && values[b < n ? b : 0] < bound);
  return first + popcount(low) + popcount(high);
}

}  // namespace dendrite::sampling
