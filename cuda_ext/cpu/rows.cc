#include "rows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "team.h"

namespace dendrite {
namespace {

// Floats below which waking the team costs more than it saves.
constexpr int64_t kSerialFloats = 1 << 16;

int threads_for(const Context& context, int64_t floats) {
  return floats < kSerialFloats ? 1 : context.threads;
}

void check_range(const char* name, const int32_t* values, int64_t count, int64_t low, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < low || values[i] >= limit)
      throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] = " +
                                  std::to_string(values[i]) + " is outside " + std::to_string(low) +
                                  ".." + std::to_string(limit - 1));
}

void copy_page(const CopyJob& job, int64_t layer, const int32_t* copy) {
  const int64_t head_floats = int64_t(job.dim) * job.page_size;
  const int64_t page_floats = head_floats * job.kv_heads;
  const int64_t from = (layer * job.pages + copy[0]) * page_floats;
  const int64_t to = (layer * job.pages + copy[1]) * page_floats;
  const size_t used = size_t(copy[2]) * sizeof(float);
  for (int64_t row = 0; row < int64_t(job.kv_heads) * job.dim; ++row)
    std::memcpy(job.k_all + to + row * job.page_size, job.k_all + from + row * job.page_size, used);
  for (int64_t head = 0; head < job.kv_heads; ++head)
    std::memcpy(job.v_all + to + head * head_floats, job.v_all + from + head * head_floats,
                used * job.dim);
}

// K and V of all rows, one kv head and side a unit: neighbouring slots share bytes, so the rows of a
// page belong to one thread.
void store_packed(Context& context, const RopeJob& job, int64_t rows, int threads) {
  parallel_units(threads, 2 * job.kv_heads, [&](int64_t unit, int) {
    const int head = int(unit / 2);
    const bool is_key = unit % 2 == 0;
    const PackedSide& side = is_key ? *job.k_side : *job.v_side;
    alignas(64) float key[kMaxPackedDim], scratch[4 * kMaxPackedDim];
    for (int64_t row = 0; row < rows; ++row) {
      if (job.slots[row] < 0) continue;
      const int64_t column = job.heads + job.kv_heads + head;
      const float* x = job.qkv + (row * (job.heads + 2 * job.kv_heads) + column) * job.dim;
      if (is_key) context.kernels->rotate_key(job, row, head, key);
      context.kernels->store_packed(side, is_key, job.slots[row], head, is_key ? key : x, scratch);
    }
  });
}

}  // namespace

void add_rms_norm(Context& context, const float* x, float* residual, const float* weight, float eps,
                  float* out, int64_t rows, int width) {
  parallel_rows(threads_for(context, rows * width), rows, [&](int64_t begin, int64_t end) {
    context.kernels->add_rms_norm(x, residual, weight, eps, out, begin, end, width);
  });
}

void rope_store_kv(Context& context, const RopeJob& job, int64_t rows, int64_t max_position,
                   int64_t num_slots) {
  check_range("positions", job.positions, rows, 0, max_position);
  check_range("slots", job.slots, rows, -1, num_slots);
  const int64_t floats = rows * (job.heads + 2 * job.kv_heads) * job.dim;
  parallel_rows(threads_for(context, floats), rows, [&](int64_t begin, int64_t end) {
    context.kernels->rope_store_kv(job, begin, end);
  });
  if (job.k_side != nullptr) store_packed(context, job, rows, threads_for(context, floats));
}

void copy_packed(Context& context, uint8_t* data, int64_t pages, int64_t page_bytes,
                 const int32_t* copies, int64_t count) {
  for (int64_t i = 0; i < count; ++i) check_range("copies: page", copies + 3 * i, 2, 0, pages);
  parallel_units(threads_for(context, count * page_bytes / 4), count, [&](int64_t i, int) {
    std::memcpy(data + copies[3 * i + 1] * page_bytes, data + copies[3 * i] * page_bytes,
                size_t(page_bytes));
  });
}

void silu_mul(Context& context, const float* gate_up, float* out, int64_t rows, int width) {
  parallel_rows(threads_for(context, rows * width), rows, [&](int64_t begin, int64_t end) {
    context.kernels->silu_mul(gate_up, out, begin, end, width);
  });
}

void copy_pages(Context& context, const CopyJob& job) {
  for (int64_t i = 0; i < job.count; ++i) {
    check_range("copies: page", job.copies + 3 * i, 2, 0, job.pages);
    check_range("copies: used slots", job.copies + 3 * i + 2, 1, 0, job.page_size + 1);
  }
  const int64_t floats = job.count * job.layers * job.kv_heads * job.dim * job.page_size;
  parallel_units(threads_for(context, floats), job.layers, [&](int64_t layer, int) {
    for (int64_t i = 0; i < job.count; ++i) copy_page(job, layer, job.copies + 3 * i);
  });
}

}  // namespace dendrite
