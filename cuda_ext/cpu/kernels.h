// Interface between the baseline code and the per-instruction-set kernels: plain data only, so that
// no template or inline function compiled for AVX can leak into baseline code through the linker.
//
// Index algebra of one attention job (one block of rows, one kv head, one chunk of positions):
//   q-row      x = (row - block_begin) * group + g          g: query head inside the kv head's group
//   column     c = position - chunk * kChunk                0 <= c < kChunk
//   K element  k[page * page_stride + d * page_size + slot]
//   V element  v[page * page_stride + slot * dim + d]
//   score      scores[x * kScoreStride + c]
#pragma once

#include <cstdint>

#include "packed.h"

namespace dendrite {

// Softmax partials are cut at absolute multiples of kChunk positions, whatever the tree looks like.
constexpr int kChunk = 256;
// One cache line of padding keeps the rows of a tile out of the same cache sets.
constexpr int kScoreStride = kChunk + 16;

// Consecutive pages of one attention node inside one chunk, for rows of one block.
struct Run {
  int32_t page_begin;  // first index into the flattened page list
  int32_t num_pages;
  int32_t column;     // column of the first slot, a multiple of the page size
  int32_t row_begin;  // rows relative to the block
  int32_t row_end;
};

struct ChunkJob {
  const float* k;        // [pages, dim, page_size] of this kv head, pages page_stride floats apart
  const float* v;        // [pages, page_size, dim] of this kv head
  int64_t page_stride;   // floats
  const int32_t* pages;  // flattened page list of the plan
  const Run* runs;       // [num_runs], ascending in position for every row
  int num_runs;
  int group;
  int dim;
  int page_size;
  int page_shift;
  int num_q;        // q-rows in the block
  const float* q;   // [dim, q_stride] transposed and scaled queries
  int q_stride;
  const int32_t* lo;  // [num_q] first visible column of the row in this chunk
  const int32_t* hi;  // [num_q] one past the last visible column; hi <= lo: nothing to see
  float* scores;      // [num_q, kScoreStride]
  float* acc;         // [num_q, dim] out: sum of exp(score - m) * value
  float* m;           // [num_q] out: maximum score
  float* l;           // [num_q] out: sum of exp(score - m)
  // Packed pages: their sides instead of k, v and page_stride.
  const PackedSide* k_side;
  const PackedSide* v_side;
  int kv_head;
};

struct RopeJob {
  const float* qkv;  // [tokens, (heads + 2 * kv_heads) * dim]
  const int32_t* positions;
  const int32_t* slots;
  const float* cos;  // [max_position, dim / 2]
  const float* sin;
  float* k_pages;  // [pages, kv_heads, dim, page_size]
  float* v_pages;  // [pages, kv_heads, page_size, dim]
  float* q_out;    // [tokens, heads, dim]
  const float* q_norm;  // [dim] or null
  const float* k_norm;  // [dim] or null
  float eps;
  int heads, kv_heads, dim, page_size;
  const PackedSide* k_side;  // packed pages instead of k_pages and v_pages, or null
  const PackedSide* v_side;
};

// What one pass over a row of logits tells.
struct RowStats {
  float max;
  float min;       // smallest value above -inf
  int32_t argmax;  // lowest id that holds the maximum
  bool finite;     // no NaN, no Inf
};

struct KernelTable {
  const char* name;
  void (*attend_chunk)(const ChunkJob& job);
  void (*attend_packed_chunk)(const ChunkJob& job);
  // out = H (x * signs) / sqrt(dim), and with `back` H x / sqrt(dim) * signs; out may be x.
  void (*rotate)(const float* x, const float* signs, int dim, bool back, float* out);
  // One vector into its slot; scratch of 4 * dim floats.
  void (*store_packed)(const PackedSide& side, bool is_key, int64_t slot, int head, const float* x,
                       float* scratch);
  // acc, m, l (running) <- running state merged with the next chunk's partial.
  void (*merge_state)(float* acc, float* m, float* l, const float* acc_c, float m_c, float l_c,
                      int dim);
  void (*finish_row)(const float* acc, float l, float* out, int dim);
  void (*add_rms_norm)(const float* x, float* residual, const float* weight, float eps, float* out,
                       int64_t row_begin, int64_t row_end, int width);
  void (*rope_store_kv)(const RopeJob& job, int64_t row_begin, int64_t row_end);
  void (*rotate_key)(const RopeJob& job, int64_t row, int head, float* key);
  void (*silu_mul)(const float* gate_up, float* out, int64_t row_begin, int64_t row_end, int width);
  void (*row_stats)(const float* x, int n, RowStats* stats);
  double (*sum_exp)(const float* x, int n, float max);
  // With t = (max - x) / temperature: appends, in id order, every id with x > -inf and t <= distance
  // and its weight exp(-t); adds up the weights of the others. Returns how many were appended.
  int (*near_tokens)(const float* x, int n, float max, float inv_temperature, float distance,
                     int32_t* ids, float* weights, double* far_mass);
  // Appends, in order, every i with bucket[i] == wanted; returns how many.
  int (*find_bucket)(const uint16_t* bucket, int n, uint16_t wanted, int32_t* found);
  // The first i in [begin, n) with x[i] > threshold, or n.
  int (*first_above)(const float* x, int begin, int n, float threshold);
};

const KernelTable* scalar_kernels();
const KernelTable* avx2_kernels();    // null where the build has no x86
const KernelTable* avx512_kernels();  // null where the build has no x86
const KernelTable* neon_kernels();    // null where the build has no aarch64

}  // namespace dendrite
