// The k most likely tokens of a row, in order, with their log-probabilities.
#pragma once

#include "sampling_draw.cuh"
#include "sampling_stats.cuh"

namespace dendrite::sampling {

constexpr size_t kTopBytes = sizeof(Shared);

struct TopArgs {
  const float* logits;
  int64_t stride;
  const int* rows;  // which rows of logits, or null: all
  int num_logits, vocab, k;
  int* ids;         // [rows, k]
  float* logprobs;  // [rows, k]
};

// Bins of the histogram that hold the k most likely tokens, where they can be sorted at once.
DENDRITE_DEVICE bool plan_top(const Row& row, Shared& shared, int k, float scale) {
  const Distance distance = distance_of(shared.state, 1.0f);
  clear_histogram(shared);
  for_each_token<false, 4>(
      row,
      [&](float value, int) {
        const float bin = distance(value) * scale;
        if (bin < float(kBins - 1)) atomic_add(&shared.histogram[int(bin)], 1);
      },
      [] {});
  sync_block();
  accumulate_histogram(shared, scale);
  if (threadIdx.x < 32) {
    const int last = count_below(shared.histogram, kBins, k);
    const int count = last < kBins ? shared.histogram[last] : row.vocab;
    if (threadIdx.x == 0) {
      shared.windows[0] = {0, last, -1.0f, float(last + 1), 0, count, 0, 0};
      shared.num_windows = count <= kCandidates ? 1 : 0;
    }
  }
  sync_block();
  return shared.num_windows == 1;
}

// Gathers the keys in (after, upto]: at most kCandidates. Ends with a barrier.
DENDRITE_DEVICE void gather_between(const Row& row, Shared& shared, bool first, uint64_t after,
                                    uint64_t upto) {
  if (threadIdx.x == 0) shared.num_candidates = 0;
  sync_block();
  for_each_token<false, 1>(
      row,
      [&](float value, int id) {
        const uint64_t key = key_of(value, id);
        if (key > upto || (!first && key <= after)) return;
        const int at = atomic_add(&shared.num_candidates, 1);
        if (at < kCandidates) shared.keys[at] = key;
      },
      [] {});
  sync_block();
}

// One block a row. More than kCandidates tokens, and those that the histogram does not separate,
// come in rounds between two places that are found exactly.
DENDRITE_KERNEL __launch_bounds__(512, 1) top_rows(TopArgs args) {
  DENDRITE_SHARED_MEMORY(unsigned char, memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  grid_dependency_launch();
  grid_dependency_wait();
  const int k = args.k, source = args.rows == nullptr ? int(blockIdx.x) : args.rows[blockIdx.x];
  int* ids = args.ids + size_t(blockIdx.x) * k;
  float* logprobs = args.logprobs + size_t(blockIdx.x) * k;
  Row row{};
  row.vocab = row.end = args.vocab;
  const bool exists = source >= 0 && source < args.num_logits;
  if (exists) {
    row.logits = args.logits + source * args.stride;
    TileSum* tiles = reinterpret_cast<TileSum*>(shared.keys);
    RowState found = scan_row(row, tiles, shared.scratch);
    if (threadIdx.x < 32) add_tiles(tiles, tiles_of(row.vocab), found);
    if (threadIdx.x == 0) shared.state = found;
    sync_block();
  }
  const RowState& state = shared.state;
  if (!exists || state.bad) {
    for (int i = threadIdx.x; i < k; i += blockDim.x) {
      ids[i] = -1;
      logprobs[i] = bits_float(0x7fc00000u);
    }
    return;
  }
  const Distance distance = distance_of(state, 1.0f);
  const float scale = bin_scale(state, distance, kNearWithTopK);
  const bool all = row.vocab <= kCandidates;
  const bool once = all || plan_top(row, shared, k, scale);
  uint64_t after = 0;
  for (int done = 0; done < k;) {
    const int end = once ? k : min(done + kCandidates, k);
    if (all) {
      gather_between(row, shared, true, 0, ~uint64_t(0));
    } else if (once) {
      gather_row(row, shared, distance, scale);
    } else {
      const uint64_t upto = select_place(row, shared, distance, false, uint64_t(end - 1)).key;
      gather_between(row, shared, done == 0, after, upto);
      after = upto;
    }
    sort_keys(shared.keys, min(shared.num_candidates, kCandidates));
    for (int i = threadIdx.x; i < end - done; i += blockDim.x) {
      const int id = id_of_key(shared.keys[i]);
      ids[done + i] = id;
      logprobs[done + i] = logprob_of(row, state, id);
    }
    done = end;
    sync_block();
  }
}

}  // namespace dendrite::sampling
