// Chooses one token per row of logits; the rules are those of SamplingBatch (sampling_batch.py).
//
// Pass 1 (sample_scan) finds the maximum, which ends greedy rows, and the log-sum of the raw
// logits; pass 2 (sample_count) counts a histogram of distances from the maximum; pass 3
// (sample_finish) gathers and sorts the few tokens in which the filters cut and the draw falls.
// Rows with few live tokens skip pass 2. In each pass one block or several share a row.
#pragma once

#include "sampling_draw.cuh"
#include "sampling_stats.cuh"

namespace dendrite::sampling {

struct SampleArgs {
  const float* logits;
  int64_t stride;  // floats between rows
  const int* params;
  const int* previous;  // tokens of the step before, or null
  int previous_count;
  int num_logits, vocab;
  int first_row;  // of the result; row i of the workspace is row first_row + i
  unsigned char* workspace;  // workspace_bytes(vocab) a row
  int* tokens;
  float* logprobs;
  int tiles_per_block;
};

struct Workspace {
  RowWorkspace& row;
  BlockPart* parts;
  TileSum* tiles;

  DENDRITE_DEVICE Workspace(unsigned char* memory, int vocab, size_t index)
      : row(*reinterpret_cast<RowWorkspace*>(memory + index * workspace_bytes(vocab))),
        parts(reinterpret_cast<BlockPart*>(&row + 1)),
        tiles(reinterpret_cast<TileSum*>(parts + kMaxBlocks)) {}
};

// Bytes of Shared that the three passes use.
static_assert(kMaxBlocks == 32 && kWindows <= 4);  // a lane for each block, a warp for each window
constexpr size_t kScanBytes = offsetof(Shared, histogram), kCountBytes = offsetof(Shared, keys),
                 kFinishBytes = sizeof(Shared);

// Row `index`, all tokens of it; false where no token is wanted.
DENDRITE_DEVICE bool open_row(const SampleArgs& args, void* bitmap, int index, Row& row) {
  const Header& header = *reinterpret_cast<const Header*>(args.params);
  row.params = args.params;
  row.record = reinterpret_cast<const Record*>(&header + 1) + index;
  row.vocab = args.vocab;
  row.begin = 0;
  row.end = args.vocab;
  row.bitmap = static_cast<uint32_t*>(bitmap);
  if (header.version != kVersion || header.vocab != args.vocab) return false;
  if (index >= header.rows) return false;
  const int logits_row = row.record->logits_row;
  if (logits_row < 0 || logits_row >= args.num_logits) return false;
  row.logits = args.logits + logits_row * args.stride;
  const int previous = row.record->previous;
  row.previous = previous >= 0 && previous < args.previous_count ? args.previous[previous] : -1;
  row.edited = row.record->mask_row >= 0 || row.edits().size() > 0;
  return true;
}

// Leaves the part of a row that belongs to one block.
DENDRITE_DEVICE void limit_row(Row& row, int tiles_per_block, int block) {
  row.begin = min(block * tiles_per_block * kTile, row.vocab);
  row.end = min(row.begin + tiles_per_block * kTile, row.vocab);
}

DENDRITE_DEVICE void finish_row(const SampleArgs& args, const Row& row, int index,
                                const RowState& state, int token) {
  if (threadIdx.x != 0) return;
  args.tokens[index] = token;
  args.logprobs[index] = token >= 0 ? logprob_of(row, state, token) : bits_float(0x7fc00000u);
}

DENDRITE_DEVICE bool is_greedy(const Row& row) {
  return !(row.record->inverse_temperature > 0.0f);
}
DENDRITE_DEVICE int best_id(const RowState& state) { return int(~uint32_t(state.best)); }

// Writes rows that are done after the first pass; true for those.
DENDRITE_DEVICE bool finish_early(const SampleArgs& args, const Row& row, int index,
                                  const RowState& state) {
  const bool bad = state.bad || state.best == 0, done = bad || is_greedy(row);
  if (done) finish_row(args, row, index, state, bad ? -1 : best_id(state));
  return done;
}

// True, in every thread, for the last block of a row to come here; it sees what the others wrote.
DENDRITE_DEVICE bool last_to_arrive(int* arrivals, Shared& shared) {
  thread_fence();
  sync_block();
  if (threadIdx.x == 0) {
    shared.last_block = atomic_add(arrivals, 1) == int(gridDim.y) - 1;
    if (shared.last_block) *arrivals = 0;
    thread_fence();
  }
  sync_block();
  return shared.last_block != 0;
}

// First pass. Greedy rows end here; the state of the others goes to the workspace.
DENDRITE_KERNEL __launch_bounds__(512, 2) sample_scan(SampleArgs args) {
  DENDRITE_SHARED_MEMORY(unsigned char, memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  grid_dependency_launch();
  grid_dependency_wait();
  const int index = args.first_row + int(blockIdx.x), block = blockIdx.y;
  Row row;
  if (!open_row(args, memory + kScanBytes, index, row)) {
    if (block == 0) finish_row(args, row, index, RowState{}, -1);
    return;
  }
  const Workspace work(args.workspace, args.vocab, blockIdx.x);
  limit_row(row, args.tiles_per_block, block);
  if (row.edited) make_bitmap(row);
  RowState state = scan_row(row, work.tiles, shared.scratch);
  if (threadIdx.x == 0) {
    BlockPart& part = work.parts[block];
    part.best = state.best;
    part.lowest = state.lowest;
    part.live = state.live;
    part.bad = state.bad;
  }
  if (!last_to_arrive(&work.row.arrivals[0], shared)) return;
  if (threadIdx.x >= 32) return;
  const bool is_part = threadIdx.x < gridDim.y;  // kMaxBlocks: a lane for each
  const BlockPart& part = work.parts[is_part ? threadIdx.x : 0];
  state.best = warp_max(is_part ? part.best : 0);
  state.lowest = -warp_max(is_part ? -part.lowest : -kInfinity);
  state.live = warp_sum(is_part ? part.live : 0);
  state.bad = warp_max(is_part ? part.bad : 0);
  add_tiles(work.tiles, tiles_of(row.vocab), state);
  if (finish_early(args, row, index, state)) state.bad = 1;  // nothing is left to do
  if (threadIdx.x == 0) work.row.state = state;
}

// Second pass: the histogram and the masses.
DENDRITE_KERNEL __launch_bounds__(512, 2) sample_count(SampleArgs args) {
  DENDRITE_SHARED_MEMORY(unsigned char, memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  grid_dependency_launch();
  grid_dependency_wait();
  const int index = args.first_row + int(blockIdx.x), block = blockIdx.y;
  Row row;
  if (!open_row(args, memory + kCountBytes, index, row)) return;
  const Workspace work(args.workspace, args.vocab, blockIdx.x);
  const RowState state = work.row.state;
  if (state.bad || state.live <= kCandidates) return;
  limit_row(row, args.tiles_per_block, block);
  if (row.edited) make_bitmap(row);
  clear_histogram(shared);
  const Masses masses = count_row(row, shared, state);
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) {
    if (shared.histogram[i] == 0) continue;
    if (gridDim.y == 1)
      work.row.histogram[i] = shared.histogram[i];
    else
      atomic_add(&work.row.histogram[i], shared.histogram[i]);
  }
  if (threadIdx.x == 0) {
    BlockPart& part = work.parts[block];
    part.total = masses.total;
    part.near_max = masses.near_max;
    part.near_max_count = masses.near_max_count;
  }
}

// The masses of all blocks; for whole warps.
DENDRITE_DEVICE Masses add_masses(const Row& row, const Workspace& work, const RowState& state) {
  const uint32_t lane = threadIdx.x % 32;
  const bool is_part = lane < gridDim.y;
  const BlockPart& part = work.parts[is_part ? lane : 0];
  return {warp_sum(is_part ? part.total : 0), warp_sum(is_part ? part.near_max : 0),
          warp_sum(is_part ? part.near_max_count : 0),
          bin_scale(state, distance_of(state, row.record->inverse_temperature),
                    near_of(*row.record))};
}

// Hands what this block gathered to the last one. Ends with a barrier.
DENDRITE_DEVICE void publish(const Workspace& work, Shared& shared, const Before& before,
                             int block) {
  const int n = min(shared.num_candidates, kCandidates);
  if (threadIdx.x == 0) {
    shared.last_block = atomic_add(&work.row.candidates, n);
#pragma unroll
    for (int i = 0; i < kWindows; ++i) work.parts[block].before[i] = before.mass[i];
  }
  sync_block();
  const int start = shared.last_block;
  for (int i = threadIdx.x; i < n && start + i < kCandidates; i += blockDim.x)
    work.row.keys[start + i] = shared.keys[i];
  sync_block();
}

// Plans the windows of a row and gathers the part of it that belongs to this block.
DENDRITE_DEVICE void gather_part(const SampleArgs& args, Row& row, const Workspace& work,
                                 Shared& shared, const RowState& state) {
  Masses masses{};
  if (state.live <= kCandidates) {
    plan_all(shared, state);
  } else {
    masses = add_masses(row, work, state);
    for (int i = threadIdx.x; i < kBins; i += blockDim.x)
      shared.histogram[i] = work.row.histogram[i];
    sync_block();
    plan_windows(row, shared, masses);
  }
  limit_row(row, args.tiles_per_block, blockIdx.y);
  if (row.edited) make_bitmap(row);
  const Distance distance = distance_of(state, row.record->inverse_temperature);
  const Before mine = gather_row(row, shared, distance, masses.scale);
  publish(work, shared, mine, blockIdx.y);
}

// Takes what all blocks gathered, and leaves the workspace as it was found. Ends with a barrier.
DENDRITE_DEVICE void collect(const Workspace& work, Shared& shared) {
  const int n = min(work.row.candidates, kCandidates);
  for (int i = threadIdx.x; i < n; i += blockDim.x) shared.keys[i] = work.row.keys[i];
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) work.row.histogram[i] = 0;
  const uint32_t window = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (int(window) < shared.num_windows) {  // a warp each
    const uint64_t before = warp_sum(lane < gridDim.y ? work.parts[lane].before[window] : 0);
    if (lane == 0) shared.windows[window].before = before;
  }
  sync_block();
  if (threadIdx.x == 0) {
    shared.num_candidates = n;
    work.row.candidates = 0;
  }
  sync_block();
}

// Third pass: every block of a row makes the same plan and gathers its part; the last one draws.
DENDRITE_KERNEL __launch_bounds__(256, 3) sample_finish(SampleArgs args) {
  DENDRITE_SHARED_MEMORY(unsigned char, memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  grid_dependency_launch();
  grid_dependency_wait();
  const int index = args.first_row + int(blockIdx.x);
  Row row;
  if (!open_row(args, memory + kFinishBytes, index, row)) return;
  const Workspace work(args.workspace, args.vocab, blockIdx.x);
  if (work.row.state.bad) return;
  if (threadIdx.x == 0) shared.row = row;  // kept there, not in registers
  gather_part(args, row, work, shared, work.row.state);
  if (!last_to_arrive(&work.row.arrivals[1], shared)) return;
  collect(work, shared);
  const RowState& state = work.row.state;
  row = shared.row;
  if (row.edited) make_bitmap(row);
  const Draw draw{row, shared, distance_of(state, row.record->inverse_temperature)};
  const bool complete = state.live <= kCandidates;
  if (!complete) {
    const Masses masses = add_masses(row, work, state);
    if (threadIdx.x == 0) shared.masses = masses;
  }
  finish_row(args, row, index, state, draw.token(state.live, complete));
}

}  // namespace dendrite::sampling
