// What the bindings of tree attention over either kind of page share.
#pragma once

#include "bindings_common.h"
#include "dendrite/attention_work.h"
#include "dendrite/tree_attention_params.h"
#include "tree_attention.h"

namespace dendrite {

// `more`: tiles that there are kernels for besides those of unquantised pages.
inline void check_shape(const Call& call, const TreeAttentionShape& shape, bool taken,
                        const char* more = "") {
  call.require(taken, "q", "has head_dim ", shape.head_dim, " and q_tile is ", shape.q_tile,
               "; there are kernels for head_dim 64, 96, 128 and 256 with q_tile 64, and for 64, 96 "
               "and 128 in fp16 and bf16 with q_tile 128", more);
}

inline int power_of_two_shift(const Call& call, const char* name, int value) {
  call.require(value > 0 && (value & (value - 1)) == 0, name, "must have pages of a power of two of "
               "slots, got ", value);
  int shift = 0;
  while ((1 << shift) < value) ++shift;
  return shift;
}

inline void check_attention(const Call& call, const TreeAttentionShape& shape, int heads,
                            int64_t kv_heads, int64_t window, int64_t workers) {
  call.require(kv_heads > 0 && heads % kv_heads == 0, "q", "has ", heads,
               " heads, not a multiple of the ", kv_heads, " kv heads of the pages");
  call.require(heads / kv_heads <= shape.q_tile, "q", "has ", heads / kv_heads,
               " heads for a kv head, more than q_tile ", shape.q_tile);
  call.require(workers > 0, "workers", "must be at least 1, got ", workers);
  call.require(window >= 0, "window", "must be at least 0, got ", window);
}

// All but the tensors, and what depends on the pages.
inline TreeAttentionParams attention_params(const TreeAttentionShape& shape, int rows, int heads,
                                            int kv_heads, double scale, int64_t window) {
  TreeAttentionParams params{};
  params.heads = heads;
  params.kv_heads = kv_heads;
  params.group = heads / kv_heads;
  params.group_inverse = group_inverse(params.group);
  params.window = int32_t(window);
  params.rows_per_block = rows_of_block(shape.q_tile, params.group);
  params.segments_at = int32_t(segments_offset(rows, params.rows_per_block));
  params.scale_log2 = float(scale * 1.4426950408889634);
  return params;
}

// Partial results for which there is room in a buffer of so many floats.
inline int32_t slots_that_fit(const TreeAttentionShape& shape, int64_t floats, int kv_heads) {
  return int32_t(floats / (int64_t{kv_heads} * shape.q_tile * (shape.head_dim + 2)));
}

}  // namespace dendrite
