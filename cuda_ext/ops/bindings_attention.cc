#include "bindings_common.h"
#include "tree_attention.h"
#include "dendrite/attention_work.h"
#include "dendrite/tree_attention_params.h"

namespace dendrite {
namespace {

int checked_q_tile(const Call& call, const TreeAttentionShape& shape) {
  call.require(tree_attention_takes(shape), "q",
               "has head_dim ", shape.head_dim, " and q_tile is ", shape.q_tile,
               "; there are kernels for head_dim 64, 96, 128 and 256 with q_tile 64, and for 64, 96 "
               "and 128 in fp16 and bf16 with q_tile 128");
  return shape.q_tile;
}

int power_of_two_shift(const Call& call, const char* name, int value) {
  call.require(value > 0 && (value & (value - 1)) == 0, name, "must have pages of a power of two of "
               "slots, got ", value);
  int shift = 0;
  while ((1 << shift) < value) ++shift;
  return shift;
}

void tree_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                    const Tensor& positions, const Tensor& work, const Tensor& partials,
                    const Tensor& out, double scale, int64_t window,
                    int64_t q_tile, int64_t workers) {
  Call call("tree_attention");
  const Argument query = call.floats("q", q, {kAny, kAny, kAny});
  const int rows = query.size(0), heads = query.size(1), dim = query.size(2);
  const Argument keys = call.floats("k_pages", k_pages, {kAny, kAny, kAny, dim}, query.dtype());
  const int pages = keys.size(0), kv_heads = keys.size(1), page_size = keys.size(2);
  const Argument values =
      call.floats("v_pages", v_pages, {pages, kv_heads, page_size, dim}, query.dtype());
  const Argument result = call.floats("out", out, {rows, heads, dim}, query.dtype());
  const Argument where = call.ints("positions", positions, {rows});
  const Argument list = call.ints("work", work, {kAny}, true);
  const Argument scratch = call.floats("partials", partials, {kAny}, Dtype::kF32);
  const TreeAttentionShape shape{query.dtype(), dim, int(q_tile)};
  checked_q_tile(call, shape);
  call.require(kv_heads > 0 && heads % kv_heads == 0, "q", "has ", heads,
               " heads, not a multiple of the ", kv_heads, " kv heads of k_pages");
  call.require(heads / kv_heads <= q_tile, "q", "has ", heads / kv_heads,
               " heads for a kv head, more than q_tile ", q_tile);
  call.require(workers > 0, "workers", "must be at least 1, got ", workers);
  call.require(window >= 0, "window", "must be at least 0, got ", window);
  if (rows == 0) return;
  TreeAttentionParams params{};
  params.q = query.data();
  params.k_pages = keys.data();
  params.v_pages = values.data();
  params.positions = where.as<const int32_t>();
  params.work = list.as<const int32_t>();
  params.partials = scratch.as<float>();
  params.out = result.data();
  params.heads = heads;
  params.kv_heads = kv_heads;
  params.pages = pages;
  params.group = heads / kv_heads;
  params.group_inverse = group_inverse(params.group);
  params.page_shift = power_of_two_shift(call, "k_pages", page_size);
  params.window = int32_t(window);
  params.max_slots = int32_t(scratch.size(0) / (int64_t(kv_heads) * q_tile * (dim + 2)));
  params.rows_per_block = rows_of_block(int(q_tile), params.group);
  params.segments_at = int32_t(segments_offset(rows, params.rows_per_block));
  params.scale_log2 = float(scale * 1.4426950408889634);
  launch_tree_attention(params, shape, rows, int(workers), call.stream());
}

int64_t workers_that_fill(const Tensor& like, int64_t head_dim, int64_t kv_heads, int64_t q_tile) {
  Call call("tree_attention_workers");
  const Argument type = call.floats("like", like, {kAny}, false);
  const TreeAttentionShape shape{type.dtype(), int(head_dim), int(q_tile)};
  checked_q_tile(call, shape);
  call.require(kv_heads > 0, "kv_heads", "must be at least 1, got ", kv_heads);
  return tree_attention_workers(shape, int(kv_heads));
}

}  // namespace

DENDRITE_OPS(m) {
  m.impl("tree_attention", TORCH_BOX(&tree_attention));
  m.impl("tree_attention_workers", TORCH_BOX(&workers_that_fill));
}

}  // namespace dendrite
