// Arguments of the row kernels and of copy_pages: plain C++, shared by kernels, launchers and
// bindings. T is the compute dtype: fp32, fp16 or bf16.
#pragma once

#include <cstdint>

namespace dendrite {

struct NormParams {
  const void* x;        // [rows of residual, width] T, or null
  float* residual;      // [num_residual_rows, width]
  const void* weight;   // [width] T
  const int32_t* rows;  // [rows of out] the row of the residual for each, or null: row i for row i
  void* out;            // [rows of out, width] T
  int num_residual_rows;
  int width;  // a multiple of 4
  float eps;
};

struct RopeParams {
  const void* qkv;           // [tokens, heads + 2 * kv_heads, dim] T: queries, keys, values
  const int32_t* positions;  // [tokens]
  const float* cos;          // [max_position, dim / 2]
  const float* sin;
  const int32_t* slots;  // [tokens] page * page_size + offset; -1: not stored
  void* k_pages;         // [pages, kv_heads, page_size, dim] T
  void* v_pages;         // the same
  void* q_out;           // [tokens, heads, dim] T
  const void* q_norm;    // [dim] T, or null
  const void* k_norm;    // the same
  float eps;
  int tokens, heads, kv_heads, dim, max_position, page_size;
  int num_slots;  // pages * page_size
};

struct CopyParams {
  void* k_all;            // [layers, pages, kv_heads, page_size, dim]
  void* v_all;            // the same
  const int32_t* copies;  // [max_copies, 3] source page, destination page, used slots
  const int32_t* count;   // [1] copies that are there
  int max_copies, layers, pages, kv_heads, page_size;
  int slot_bytes;  // of one slot of one head, a multiple of 16
};

struct EmbedParams {
  const int32_t* token_ids;  // [rows]
  const void* table;         // [vocabulary, width] T
  float* residual;           // [rows, width]
  int rows, vocabulary;
  int width;  // a multiple of 4
};

struct TakeParams {
  int32_t* token_ids;    // [rows], in place
  const int32_t* drawn;  // [count]
  int rows, count;
};

struct SiluParams {
  const void* gate_up;  // [rows, 2 * width] T
  void* out;            // [rows, width] T
  int rows;
  int width;  // a multiple of 8
};

}  // namespace dendrite
