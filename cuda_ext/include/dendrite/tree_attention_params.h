// Arguments of the tree attention kernels.
#pragma once

#include <cstdint>

namespace dendrite {

struct TreeAttentionParams {
  const void* q;             // [rows, heads, head_dim]
  const void* k_pages;       // [pages, kv_heads, page_size, head_dim]
  const void* v_pages;       // the same
  const int32_t* positions;  // [rows]
  const int32_t* work;       // see attention_work.h
  float* partials;           // [max_slots * kv_heads * q_tile * (head_dim + 2)]
  void* out;                 // [rows, heads, head_dim]
  int32_t heads, kv_heads, group, page_shift, window, max_slots;
  int32_t group_inverse;     // see below
  int32_t pages;
  int32_t rows_per_block, segments_at;  // of the work list
  float scale_log2;  // scale * log2(e)
};

// i * group_inverse >> kGroupInverseShift is i / group for 0 <= i < 256 and 1 <= group <= 256.
constexpr int kGroupInverseShift = 16;
constexpr int32_t group_inverse(int group) {
  return ((1 << kGroupInverseShift) + group - 1) / group;
}

}  // namespace dendrite
