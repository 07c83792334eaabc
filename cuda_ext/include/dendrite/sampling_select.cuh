// Finds one place in the sampling order of a row exactly, whatever its values: a radix search over
// keys (value descending, then id ascending), one pass over the row a digit. The slow way, for
// places that no window holds: inside many ties, and far in the tail.
//
// These are functions of their own that take all they need from shared memory: inlined, they would
// take registers from the code that runs for every row.
#pragma once

#include "sampling_shared.cuh"

namespace dendrite::sampling {

struct Digit {
  int shift, width;
};
DENDRITE_DEVICE Digit digit_of(int level) {  // three of the value, two of the id
  return level == 0   ? Digit{53, 11}
         : level == 1 ? Digit{42, 11}
         : level == 2 ? Digit{32, 10}
         : level == 3 ? Digit{9, 10}
                      : Digit{0, 9};
}
constexpr int kDigits = 5;

// Adds runs of equal bins at once: rows that need this search often have many equal values. A
// weight is added as two words.
struct RunningBin {
  int bin = -1, count = 0;
  uint64_t mass = 0;

  DENDRITE_DEVICE void add(Shared& shared, int to, uint64_t weight) {
    if (to != bin) {
      flush(shared);
      bin = to;
      count = 0;
      mass = 0;
    }
    ++count;
    mass += weight;
  }
  DENDRITE_DEVICE void flush(Shared& shared) const {
    if (bin < 0) return;
    atomic_add(&shared.histogram[bin], count);
    int* words = reinterpret_cast<int*>(&shared.keys[bin]);
    const uint32_t low = uint32_t(mass);
    const uint32_t old = uint32_t(atomic_add(&words[0], int(low)));
    atomic_add(&words[1], int(uint32_t(mass >> 32) + (old + low < old ? 1u : 0u)));
  }
};

// Counts (in histogram) and adds up (in keys) the tokens that agree with shared.place in the digits
// before this one. Begins and ends with a barrier.
DENDRITE_COLD void count_digits(Shared* memory, Distance distance, int level) {
  Shared& shared = *memory;
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) {
    shared.histogram[i] = 0;
    shared.keys[i] = 0;
  }
  sync_block();
  const Row row = shared.row;
  const Digit digit = digit_of(level);
  const uint64_t prefix = shared.place.key;
  RunningBin running;
  for_each_token<true, 1>(
      row,
      [&](float value, int id) {
        const uint64_t key = key_of(value, id);
        if ((key ^ prefix) >> digit.shift >> digit.width != 0) return;
        const int bin = int(key >> digit.shift) & ((1 << digit.width) - 1);
        running.add(shared, bin, whole(weight_at(distance(value))));
      },
      [] {});
  running.flush(shared);
  sync_block();
}

// Moves shared.place to the bin of a digit that holds the target. Ends with a barrier.
DENDRITE_COLD void descend(Shared* memory, int level, bool by_mass, uint64_t target) {
  Shared& shared = *memory;
  const int per_thread = kBins / int(blockDim.x), first = threadIdx.x * per_thread;
  const Place at = shared.place;
  int count = 0;
  uint64_t mass = 0;
  for (int i = first; i < first + per_thread; ++i) {
    count += shared.histogram[i];
    mass += shared.keys[i];
  }
  block_scan(count, mass, shared.scratch);  // a barrier: everyone has read the place
  count += at.rank;
  mass += at.mass;
  for (int i = first; i < first + per_thread; ++i) {
    const int next_count = count + shared.histogram[i];
    const uint64_t next = mass + shared.keys[i];
    if (by_mass ? mass < target && target <= next
                : uint64_t(count) <= target && target < uint64_t(next_count))
      shared.place = {at.key | uint64_t(i) << digit_of(level).shift, mass, count};
    count = next_count;
    mass = next;
  }
  sync_block();
}

// For the whole block: the token of rank `target`, or (by_mass) the first one at which the running
// weight reaches `target`, 1 <= target <= total weight. `row` must cover all tokens. Overwrites
// histogram and keys.
DENDRITE_DEVICE Place select_place(const Row& row, Shared& shared, Distance distance, bool by_mass,
                                   uint64_t target) {
  sync_block();
  if (threadIdx.x == 0) {
    shared.place = {0, 0, 0};
    shared.row = row;  // the functions above read it there
  }
#pragma unroll 1
  for (int level = 0; level < kDigits; ++level) {
    count_digits(&shared, distance, level);
    descend(&shared, level, by_mass, target);
  }
  Place found = shared.place;
  found.mass += whole(weight_at(distance(value_of_key(found.key))));
  sync_block();
  return found;
}

}  // namespace dendrite::sampling
