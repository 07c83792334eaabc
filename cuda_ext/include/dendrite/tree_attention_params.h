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
  int32_t* counters;         // [blocks * kv_heads], zero before and after every launch
  void* out;                 // [rows, heads, head_dim]
  int32_t heads, kv_heads, group, page_shift, window, max_slots;
  float scale_log2;  // scale * log2(e)
};

}  // namespace dendrite
