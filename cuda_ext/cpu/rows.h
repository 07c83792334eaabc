// Row-wise operations of a transformer layer and the copy-on-write page copy.
#pragma once

#include "context.h"

namespace dendrite {

// residual (or null) += x; out = rms_norm(residual or x) * weight. x, residual, out: [rows, width].
void add_rms_norm(Context& context, const float* x, float* residual, const float* weight, float eps,
                  float* out, int64_t rows, int width);

// Throws std::invalid_argument when a position or slot is outside its table.
void rope_store_kv(Context& context, const RopeJob& job, int64_t rows, int64_t max_position,
                   int64_t num_slots);

// out [rows, width] = silu(gate) * up, gate_up: [rows, 2 * width].
void silu_mul(Context& context, const float* gate_up, float* out, int64_t rows, int width);

// copies [count, 3] = (source page, destination page, used slots), in all layers.
// k_all [layers, pages, kv_heads, dim, page_size], v_all [layers, pages, kv_heads, page_size, dim].
struct CopyJob {
  float* k_all;
  float* v_all;
  const int32_t* copies;
  int64_t count, layers, pages;
  int kv_heads, dim, page_size;
};
void copy_pages(Context& context, const CopyJob& job);


// Whole pages of a packed pool [pages, page_bytes]; copies as above, their third column is not read.
void copy_packed(Context& context, uint8_t* data, int64_t pages, int64_t page_bytes,
                 const int32_t* copies, int64_t count);

}  // namespace dendrite
