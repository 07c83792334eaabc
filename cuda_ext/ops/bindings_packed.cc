// The operations on packed pages as torch ops.
#include "bindings_attention.h"
#include "dendrite/tree_attention_packed_params.h"
#include "packed_rows.h"
#include "tree_attention_packed.h"

namespace dendrite {
namespace {

// A pool of packed pages, [pages, page_bytes].
struct Pool {
  Argument data;
  int64_t page_bytes;

  Pool(Call& call, const Tensor& tensor)
      : data(call.typed("data", tensor, {kAny, kAny}, ScalarType::Byte, true)),
        page_bytes(data.size(1)) {
    call.require(page_bytes % 16 == 0, "data", "must have pages of a multiple of 16 bytes, got ",
                 page_bytes);
  }
};

void check_codec(const Call& call, const char* name, int64_t codec, int dim) {
  call.require(codec >= 0 && codec < kPackedCodecs, name, "must be from 0 to ", kPackedCodecs - 1,
               ", got ", codec);
  if (is_rotated(int(codec)))
    call.require((dim & (dim - 1)) == 0, name, "is of rotated vectors, whose head_dim must be a "
                 "power of two, got ", dim);
  if (codec == kMxfp8)
    call.require(dim % 64 == 0, name, "is mxfp8, which needs a head_dim of a multiple of 64 here, got ",
                 dim);
}

PackedLayer checked_layer(const Call& call, const Pool& pool, int dim, int64_t layer_at,
                          int64_t page_size, int64_t kv_heads, int64_t k_codec, int64_t v_codec) {
  check_codec(call, "k_codec", k_codec, dim);
  check_codec(call, "v_codec", v_codec, dim);
  call.require(page_size > 0 && page_size % kCellSlots == 0, "page_size", "must be a multiple of ",
               kCellSlots, ", got ", page_size);
  call.require(kv_heads > 0, "kv_heads", "must be at least 1, got ", kv_heads);
  PackedLayer layer{};
  layer.data = pool.data.as<char>();
  layer.page_bytes = pool.page_bytes;
  layer.at = layer_at;
  layer.pages = pool.data.size(0);
  layer.page_size = int32_t(page_size);
  layer.kv_heads = int32_t(kv_heads);
  layer.k = packed_vector(int(k_codec), dim);
  layer.v = packed_vector(int(v_codec), dim);
  call.require(layer_at >= 0 && layer_at % 16 == 0 && layer_at + layer.bytes() <= pool.page_bytes,
               "layer_at", "must be a multiple of 16 with ", layer.bytes(),
               " bytes behind it in pages of ", pool.page_bytes, ", got ", layer_at);
  return layer;
}

void check_packed_shape(const Call& call, const TreeAttentionShape& shape) {
  check_shape(call, shape, tree_attention_packed_takes(shape),
              ", and for 64 and 128 in fp16 and bf16 with q_tile 8 and 16");
}

// A table [kv_heads, dim], which is there exactly where it is `wanted`.
const float* checked_signs(Call& call, const char* name, const std::optional<Tensor>& signs,
                           int64_t kv_heads, int dim, bool wanted) {
  call.require(signs.has_value() == wanted, name,
               wanted ? "are needed: the codes are of rotated vectors"
                      : "must be left out: the codes are not of rotated vectors");
  return wanted ? call.floats(name, *signs, {kv_heads, dim}, Dtype::kF32).as<const float>() : nullptr;
}

void rope_store_packed(const Tensor& qkv, const Tensor& positions, const Tensor& cos,
                       const Tensor& sin, const Tensor& slots, const Tensor& data,
                       const Tensor& q_out, const std::optional<Tensor>& q_norm,
                       const std::optional<Tensor>& k_norm, const std::optional<Tensor>& k_signs,
                       const std::optional<Tensor>& v_signs, const std::optional<Tensor>& k_mean,
                       double eps, int64_t layer_at, int64_t page_size, int64_t kv_heads,
                       int64_t k_codec, int64_t v_codec) {
  Call call("rope_store_packed");
  const Argument queries = call.floats("q_out", q_out, {kAny, kAny, kAny});
  const Dtype dtype = queries.dtype();
  const int tokens = queries.size(0), heads = queries.size(1), dim = queries.size(2);
  call.require(dim > 0 && dim % 32 == 0 && dim <= 256, "q_out",
               "must have heads of a multiple of 32, up to 256, got ", dim);
  const Pool pool(call, data);
  RopePackedParams params{};
  params.layer =
      checked_layer(call, pool, dim, layer_at, page_size, kv_heads, k_codec, v_codec);
  call.require(heads % kv_heads == 0, "q_out", "has ", heads, " heads, not a multiple of the ",
               kv_heads, " kv heads of the pages");
  const Argument cosines = call.floats("cos", cos, {kAny, dim / 2}, Dtype::kF32);
  RopeParams& rope = params.rope;
  rope.qkv = call.floats("qkv", qkv, {tokens, (heads + 2 * kv_heads) * dim}, dtype).data();
  rope.positions = call.ints("positions", positions, {tokens}).as<int32_t>();
  rope.cos = cosines.as<float>();
  rope.sin = call.floats("sin", sin, {cosines.size(0), dim / 2}, Dtype::kF32).as<float>();
  rope.slots = call.ints("slots", slots, {tokens}).as<int32_t>();
  rope.q_out = queries.data();
  if (q_norm) rope.q_norm = call.floats("q_norm", *q_norm, {dim}, dtype).data();
  if (k_norm) rope.k_norm = call.floats("k_norm", *k_norm, {dim}, dtype).data();
  rope.eps = float(eps);
  rope.tokens = tokens;
  rope.heads = heads;
  rope.kv_heads = int(kv_heads);
  rope.dim = dim;
  rope.max_position = cosines.size(0);
  rope.page_size = int(page_size);
  rope.num_slots = int(params.layer.pages * page_size);
  params.k_signs =
      checked_signs(call, "k_signs", k_signs, kv_heads, dim, is_rotated(int(k_codec)));
  params.v_signs =
      checked_signs(call, "v_signs", v_signs, kv_heads, dim, is_rotated(int(v_codec)));
  if (k_mean) params.k_mean = call.floats("k_mean", *k_mean, {kv_heads, dim}, Dtype::kF32).as<float>();
  launch_rope_store_packed(params, dtype, call.stream());
}

void tree_attention_packed(const Tensor& q, const Tensor& data, const Tensor& positions,
                           const Tensor& work, const Tensor& partials, const Tensor& out,
                           const std::optional<Tensor>& v_signs, double scale, int64_t window,
                           int64_t q_tile, int64_t workers, int64_t layer_at, int64_t page_size,
                           int64_t kv_heads, int64_t k_codec, int64_t v_codec) {
  Call call("tree_attention_packed");
  const Argument query = call.floats("q", q, {kAny, kAny, kAny});
  const int rows = query.size(0), heads = query.size(1), dim = query.size(2);
  const Argument result = call.floats("out", out, {rows, heads, dim}, query.dtype());
  const Argument where = call.ints("positions", positions, {rows});
  const Argument list = call.ints("work", work, {kAny}, true);
  const Argument scratch = call.floats("partials", partials, {kAny}, Dtype::kF32);
  const Pool pool(call, data);
  const TreeAttentionShape shape{query.dtype(), dim, int(q_tile)};
  check_packed_shape(call, shape);
  check_attention(call, shape, heads, kv_heads, window, workers);
  TreeAttentionPackedParams params{};
  params.layer = checked_layer(call, pool, dim, layer_at, page_size, kv_heads, k_codec, v_codec);
  const int cell_bytes = params.layer.cell_bytes();
  call.require(tree_attention_packed_holds(shape, cell_bytes), "q_tile", "is ", q_tile,
               ", whose kernel has no room for cells of ", cell_bytes, " bytes");
  const float* signs =
      checked_signs(call, "v_signs", v_signs, kv_heads, dim, is_rotated(int(v_codec)));
  if (rows == 0) return;
  static_cast<TreeAttentionParams&>(params) =
      attention_params(shape, rows, heads, int(kv_heads), scale, window);
  params.q = query.data();
  params.positions = where.as<const int32_t>();
  params.work = list.as<const int32_t>();
  params.partials = scratch.as<float>();
  params.out = result.data();
  params.pages = params.layer.pages;
  params.page_shift = power_of_two_shift(call, "page_size", int(page_size));
  params.max_slots = slots_that_fit(shape, scratch.size(0), int(kv_heads));
  launch_tree_attention_packed(params, shape, signs, rows, int(workers), call.stream());
}

int64_t workers_that_fill(const Tensor& like, int64_t head_dim, int64_t kv_heads, int64_t q_tile,
                          int64_t cell_bytes) {
  Call call("tree_attention_packed_workers");
  const Argument type = call.floats("like", like, {kAny}, false);
  const TreeAttentionShape shape{type.dtype(), int(head_dim), int(q_tile)};
  check_packed_shape(call, shape);
  call.require(kv_heads > 0, "kv_heads", "must be at least 1, got ", kv_heads);
  call.require(cell_bytes > 0, "cell_bytes", "must be at least 1, got ", cell_bytes);
  return tree_attention_packed_workers(shape, int(kv_heads), int(cell_bytes));
}

void copy_packed(const Tensor& data, const Tensor& copies, const Tensor& count) {
  Call call("copy_packed");
  const Pool pool(call, data);
  const Argument list = call.ints("copies", copies, {kAny, 3});
  CopyPackedParams params{};
  params.data = pool.data.as<char>();
  params.copies = list.as<const int32_t>();
  params.count = call.ints("count", count, {1}).as<const int32_t>();
  params.page_bytes = pool.page_bytes;
  params.max_copies = list.size(0);
  params.pages = pool.data.size(0);
  launch_copy_packed(params, call.stream());
}

}  // namespace

DENDRITE_OPS(m) {
  m.impl("rope_store_packed", TORCH_BOX(&rope_store_packed));
  m.impl("tree_attention_packed", TORCH_BOX(&tree_attention_packed));
  m.impl("tree_attention_packed_workers", TORCH_BOX(&workers_that_fill));
  m.impl("copy_packed", TORCH_BOX(&copy_packed));
}

}  // namespace dendrite
