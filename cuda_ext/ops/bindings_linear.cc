// skinny_linear and skinny_linear_silu_mul as torch ops.
#include "bindings_common.h"
#include "skinny_linear.h"

namespace dendrite {
namespace {

void run(Call& call, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
         const Tensor& out, bool gated) {
  const Argument input = call.floats("x", x, {kAny, kAny});
  const Dtype dtype = input.dtype();
  SkinnyParams params{};
  params.rows = input.size(0);
  params.inputs = input.size(1);
  call.require(dtype != Dtype::kF32, "x", "must be fp16 or bf16, got Float");
  call.require(params.rows <= kSkinnyMaxRows, "x", "must have at most ", kSkinnyMaxRows,
               " rows, got ", params.rows);
  call.require(params.inputs > 0 && params.inputs % 8 == 0, "x",
               "must have rows of a multiple of 8, got ", params.inputs);
  const Argument weights = call.floats("weight", weight, {kAny, params.inputs}, dtype);
  call.require(!gated || weights.size(0) % 2 == 0, "weight",
               "must have as many gates as ups, got ", weights.size(0), " rows");
  params.columns = gated ? weights.size(0) / 2 : weights.size(0);
  const Argument result = gated ? call.floats("out", out, {params.rows, params.columns}, dtype)
                                : call.floats("out", out, {params.rows, params.columns});
  call.require(result.dtype() == dtype || result.dtype() == Dtype::kF32, "out",
               "must be fp32 or of the dtype of x");
  if (bias) params.bias = call.floats("bias", *bias, {params.columns}, dtype, false).data();
  params.x = input.data();
  params.weight = weights.data();
  params.out = result.data();
  if (params.rows == 0 || params.columns == 0) return;
  params.plan = plan_skinny_linear(params.columns, params.inputs, gated);
  launch_skinny_linear(params, dtype, result.dtype(), gated, call.stream());
}

void skinny_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& out) {
  Call call("skinny_linear");
  run(call, x, weight, bias, out, false);
}

void skinny_linear_silu_mul(const Tensor& x, const Tensor& weight, const Tensor& out) {
  Call call("skinny_linear_silu_mul");
  run(call, x, weight, std::nullopt, out, true);
}

}  // namespace
}  // namespace dendrite

DENDRITE_OPS(m) {
  m.impl("skinny_linear", TORCH_BOX(&dendrite::skinny_linear));
  m.impl("skinny_linear_silu_mul", TORCH_BOX(&dendrite::skinny_linear_silu_mul));
}
