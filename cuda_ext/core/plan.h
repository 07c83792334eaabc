// One forward pass over many branches: rows (tokens) in depth-first order of the segment tree and
// the attention nodes that cover, for each row, the positions 0 .. its own exactly once.
#pragma once

#include <cstdint>
#include <vector>

#include "segment_tree.h"

namespace dendrite {

struct PlanArrays {
  std::vector<int32_t> token_ids, positions, slots;  // [T]; slot -1 = K and V are not stored
  std::vector<int32_t> copies;                       // [C, 3] source page, target page, slots
  std::vector<int32_t> logits_row;                   // [branches], -1 = not finished by this plan
  std::vector<int32_t> item_indptr{0};               // [items + 1] rows
  std::vector<int32_t> node_pos, node_len, node_row_begin, node_row_end;  // [N]
  std::vector<int32_t> node_page_indptr{0};          // [N + 1]
  std::vector<int32_t> page_indices;
};

// Fills `arrays` and returns the tokens it computes; changes nothing but scratch fields.
// `mark` differs from that of every earlier call on this tree.
std::vector<FlightItem> build_plan(SegmentTree& tree, const std::vector<Segment*>& tails,
                                   const int32_t* quotas, int64_t mark, PlanArrays& arrays);

}  // namespace dendrite
