// The row operations of a layer and copy_pages as torch ops.
#include "bindings_common.h"
#include "copy_pages.h"
#include "elementwise.h"
#include "norm.h"
#include "rope_store.h"

namespace dendrite {
namespace {

void take_tokens(const Tensor& token_ids, const Tensor& drawn) {
  Call call("take_tokens");
  const Argument ids = call.ints("token_ids", token_ids, {kAny});
  const Argument tokens = call.ints("drawn", drawn, {kAny});
  launch_take_tokens({ids.as<int32_t>(), tokens.as<int32_t>(), ids.size(0), tokens.size(0)},
                     call.stream());
}

void embed(const Tensor& token_ids, const Tensor& table, const Tensor& residual) {
  Call call("embed");
  const Argument out = call.floats("residual", residual, {kAny, kAny}, Dtype::kF32);
  const int rows = out.size(0), width = out.size(1);
  const Argument from = call.floats("table", table, {kAny, width});
  call.require(width % 4 == 0, "table", "must have rows of a multiple of 4, got ", width);
  EmbedParams params{};
  params.token_ids = call.ints("token_ids", token_ids, {rows}).as<int32_t>();
  params.table = from.data();
  params.residual = out.as<float>();
  params.rows = rows;
  params.vocabulary = from.size(0);
  params.width = width;
  launch_embed(params, from.dtype(), call.stream());
}

void add_rms_norm(const std::optional<Tensor>& x, const Tensor& residual, const Tensor& weight,
                  double eps, const Tensor& out, const std::optional<Tensor>& rows) {
  Call call("add_rms_norm");
  const Argument stream = call.floats("residual", residual, {kAny, kAny}, Dtype::kF32);
  const int tokens = stream.size(0), width = stream.size(1);
  const Argument weights = call.floats("weight", weight, {width});
  call.require(norm_takes_width(width), "residual",
               "must have rows of a multiple of 4, up to 16384, got ", width);
  NormParams params{};
  params.residual = stream.as<float>();
  params.weight = weights.data();
  params.num_residual_rows = tokens;
  params.width = width;
  params.eps = float(eps);
  if (x) params.x = call.floats("x", *x, {tokens, width}, weights.dtype()).data();
  const int64_t num_out = rows ? kAny : tokens;
  const Argument result = call.floats("out", out, {num_out, width}, weights.dtype());
  params.out = result.data();
  if (rows) params.rows = call.ints("rows", *rows, {result.size(0)}).as<int32_t>();
  launch_add_rms_norm(params, result.size(0), weights.dtype(), call.stream());
}

void rope_store_kv(const Tensor& qkv, const Tensor& positions, const Tensor& cos, const Tensor& sin,
                   const Tensor& slots, const Tensor& k_pages, const Tensor& v_pages,
                   const Tensor& q_out, const std::optional<Tensor>& q_norm,
                   const std::optional<Tensor>& k_norm, double eps) {
  Call call("rope_store_kv");
  const Argument queries = call.floats("q_out", q_out, {kAny, kAny, kAny});
  const Dtype dtype = queries.dtype();
  const int tokens = queries.size(0), heads = queries.size(1), dim = queries.size(2);
  call.require(dim > 0 && dim % 8 == 0 && dim <= 256, "q_out",
               "must have heads of a multiple of 8, up to 256, got ", dim);
  const Argument keys = call.floats("k_pages", k_pages, {kAny, kAny, kAny, dim}, dtype);
  const int pages = keys.size(0), kv_heads = keys.size(1), page_size = keys.size(2);
  const Argument values = call.floats("v_pages", v_pages, {pages, kv_heads, page_size, dim}, dtype);
  const Argument cosines = call.floats("cos", cos, {kAny, dim / 2}, Dtype::kF32);
  RopeParams params{};
  params.qkv = call.floats("qkv", qkv, {tokens, (heads + 2 * kv_heads) * dim}, dtype).data();
  params.positions = call.ints("positions", positions, {tokens}).as<int32_t>();
  params.cos = cosines.as<float>();
  params.sin = call.floats("sin", sin, {cosines.size(0), dim / 2}, Dtype::kF32).as<float>();
  params.slots = call.ints("slots", slots, {tokens}).as<int32_t>();
  params.k_pages = keys.data();
  params.v_pages = values.data();
  params.q_out = queries.data();
  if (q_norm) params.q_norm = call.floats("q_norm", *q_norm, {dim}, dtype).data();
  if (k_norm) params.k_norm = call.floats("k_norm", *k_norm, {dim}, dtype).data();
  params.eps = float(eps);
  params.tokens = tokens;
  params.heads = heads;
  params.kv_heads = kv_heads;
  params.dim = dim;
  params.max_position = cosines.size(0);
  params.page_size = page_size;
  params.num_slots = pages * page_size;
  launch_rope_store_kv(params, dtype, call.stream());
}

void silu_mul(const Tensor& gate_up, const Tensor& out) {
  Call call("silu_mul");
  const Argument result = call.floats("out", out, {kAny, kAny});
  SiluParams params{};
  params.rows = result.size(0);
  params.width = result.size(1);
  call.require(params.width % 8 == 0, "out", "must have rows of a multiple of 8, got ",
               params.width);
  params.gate_up =
      call.floats("gate_up", gate_up, {params.rows, 2 * params.width}, result.dtype()).data();
  params.out = result.data();
  launch_silu_mul(params, result.dtype(), call.stream());
}

void copy_pages(const Tensor& k_all, const Tensor& v_all, const Tensor& copies,
                const Tensor& count) {
  Call call("copy_pages");
  const Argument keys = call.floats("k_all", k_all, {kAny, kAny, kAny, kAny, kAny});
  CopyParams params{};
  params.layers = keys.size(0);
  params.pages = keys.size(1);
  params.kv_heads = keys.size(2);
  params.page_size = keys.size(3);
  const int dim = keys.size(4);
  params.slot_bytes = dim * element_bytes(keys.dtype());
  call.require(dim % 8 == 0, "k_all", "must have heads of a multiple of 8, got ", dim);
  params.k_all = keys.data();
  params.v_all = call.floats("v_all", v_all,
                             {params.layers, params.pages, params.kv_heads, params.page_size, dim},
                             keys.dtype())
                     .data();
  const Argument list = call.ints("copies", copies, {kAny, 3});
  params.copies = list.as<int32_t>();
  params.max_copies = list.size(0);
  params.count = call.ints("count", count, {1}).as<int32_t>();
  launch_copy_pages(params, call.stream());
}

}  // namespace
}  // namespace dendrite

DENDRITE_OPS(m) {
  m.impl("take_tokens", TORCH_BOX(&dendrite::take_tokens));
  m.impl("embed", TORCH_BOX(&dendrite::embed));
  m.impl("add_rms_norm", TORCH_BOX(&dendrite::add_rms_norm));
  m.impl("rope_store_kv", TORCH_BOX(&dendrite::rope_store_kv));
  m.impl("silu_mul", TORCH_BOX(&dendrite::silu_mul));
  m.impl("copy_pages", TORCH_BOX(&dendrite::copy_pages));
}
