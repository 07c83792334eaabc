// Where the work of tree attention is cut: at fixed positions, or by what the cuts cost.
#pragma once

#include <cstdint>
#include <vector>

namespace dendrite {

// Units [from, to) of a node, read by rows [row_begin, row_end) of one block.
struct AttentionRun {
  int32_t cell, node, from, to;
  int32_t row_begin, row_end;  // inside the block; inside the piece, once it is placed
  int32_t old;                 // units of the node before the first with a token of this step
};

// Chunks of the deterministic mode: every 512 positions up to 8192, then 8 for each doubling.
int32_t chunk_shift(int32_t position);
int32_t chunk_of(int32_t position);
int32_t chunk_end(int32_t position);

// Hands every piece to the worker with the least to do; of several, to the first.
class LeastLoaded {
 public:
  explicit LeastLoaded(int32_t workers);
  int32_t take(int64_t cost);  // the worker that gets a piece of this cost, above 0
  int64_t most() const { return most_ / workers_; }

 private:
  int64_t workers_, most_ = 0;
  std::vector<int64_t> heap_;  // load * workers + worker, the least first
};

// Every block's rows are shared out to `shares` pieces, each cut every `tiles` tiles.
struct AttentionCuts {
  int32_t shares;
  int64_t tiles;
};

// The cuts with the shortest time by a model of the kernel: what the busiest worker does, and the
// merge of partial results, if there are any. `runs` of block `cell`; rows of each block.
AttentionCuts choose_cuts(const std::vector<AttentionRun>& runs,
                          const std::vector<int32_t>& block_rows, int32_t workers);

// What a block reads of one chunk: its rows, and units of the whole chunk.
struct AttentionCell {
  int32_t rows;
  int64_t longest;
};

// Pieces of every cell, of which each has a part of the rows; 0 for a cell that reads nothing. The
// cuts are fixed, but a row's result does not depend on the rows beside it: these are chosen, by the
// same model.
std::vector<int32_t> choose_shares(const std::vector<AttentionRun>& runs,
                                   const std::vector<AttentionCell>& cells, int32_t workers);

}  // namespace dendrite
