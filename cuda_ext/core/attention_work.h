// Cuts the attention nodes of a plan into the work list that the GPU kernels read; see
// cuda_ext/include/dendrite/attention_work.h for its layout.
//
// Rows are taken in blocks that fill a tile of queries. A block reads the pages of its rows' nodes in
// depth-first order, or what both halves of its rows read first (attention_order.h); either way each
// row meets its own pages in increasing position. The list of a block is cut
//  - by what cuts cost (attention_cuts.h): not at all, by rows, or along the tokens, or
//  - at fixed absolute positions (deterministic): where a row is cut depends on positions alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dendrite {

struct AttentionPlan {
  const int32_t* positions;  // [rows]
  int64_t num_rows;
  const int32_t *node_pos, *node_len, *node_row_begin, *node_row_end;  // [nodes]
  const int32_t* node_page_indptr;                                     // [nodes + 1]
  int64_t num_nodes;
  const int32_t* page_indices;
  int64_t num_page_indices;
};

struct AttentionCut {
  int32_t rows;  // of the batch as it runs: those of the plan, and padding
  int32_t page_size;
  int32_t group;    // query heads of a kv head
  int32_t q_tile;   // queries of a block
  int32_t workers;  // for each kv head
  int32_t window;   // 0: none
  bool deterministic;
};

struct AttentionWorkSize {
  int64_t ints, slots, blocks;
};

// Writes the list when it fits into `capacity` ints, and returns what it needs in any case.
// O(rows + pages read by blocks). Throws InvalidArgumentError on a plan that contradicts itself.
AttentionWorkSize build_attention_work(const AttentionPlan& plan, const AttentionCut& cut,
                                       int32_t* out, int64_t capacity);

}  // namespace dendrite
