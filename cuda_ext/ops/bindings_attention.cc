#include "bindings_attention.h"

namespace dendrite {
namespace {

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
  check_shape(call, shape, tree_attention_takes(shape));
  check_attention(call, shape, heads, kv_heads, window, workers);
  if (rows == 0) return;
  TreeAttentionParams params = attention_params(shape, rows, heads, kv_heads, scale, window);
  params.q = query.data();
  params.k_pages = keys.data();
  params.v_pages = values.data();
  params.positions = where.as<const int32_t>();
  params.work = list.as<const int32_t>();
  params.partials = scratch.as<float>();
  params.out = result.data();
  params.pages = pages;
  params.page_shift = power_of_two_shift(call, "k_pages", page_size);
  params.max_slots = slots_that_fit(shape, scratch.size(0), kv_heads);
  launch_tree_attention(params, shape, rows, int(workers), call.stream());
}

int64_t workers_that_fill(const Tensor& like, int64_t head_dim, int64_t kv_heads, int64_t q_tile) {
  Call call("tree_attention_workers");
  const Argument type = call.floats("like", like, {kAny}, false);
  const TreeAttentionShape shape{type.dtype(), int(head_dim), int(q_tile)};
  check_shape(call, shape, tree_attention_takes(shape));
  call.require(kv_heads > 0, "kv_heads", "must be at least 1, got ", kv_heads);
  return tree_attention_workers(shape, int(kv_heads));
}

}  // namespace

DENDRITE_OPS(m) {
  m.impl("tree_attention", TORCH_BOX(&tree_attention));
  m.impl("tree_attention_workers", TORCH_BOX(&workers_that_fill));
}

}  // namespace dendrite
