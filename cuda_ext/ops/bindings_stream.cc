// stream_linear, stream_linear_silu_mul and stream_linear_serves as torch ops.
#include "bindings_common.h"
#include "stream_linear.h"

namespace dendrite {
namespace {

void run(Call& call, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
         const Tensor& out, bool gated, StreamPlan wanted) {
  const Argument input = call.floats("x", x, {kAny, kAny});
  StreamShape shape{};
  shape.gated = gated;
  shape.dtype = input.dtype();
  shape.rows = input.size(0);
  shape.inputs = input.size(1);
  call.require(shape.dtype != Dtype::kF32, "x", "must be fp16 or bf16, got Float");
  call.require(shape.rows <= kStreamMaxRows, "x", "must have at most ", kStreamMaxRows,
               " rows, got ", shape.rows);
  call.require(shape.inputs > 0 && shape.inputs % kStreamPanel == 0, "x",
               "must have rows of a multiple of ", kStreamPanel, ", got ", shape.inputs);
  const Argument weights = call.floats("weight", weight, {kAny, shape.inputs}, shape.dtype);
  shape.columns = gated ? weights.size(0) / 2 : weights.size(0);
  call.require(weights.size(0) % (gated ? 8 : 4) == 0, "weight", "must have a multiple of ",
               gated ? 8 : 4, " rows, got ", weights.size(0));
  const Argument result = gated
                              ? call.floats("out", out, {shape.rows, shape.columns}, shape.dtype)
                              : call.floats("out", out, {shape.rows, shape.columns});
  shape.out = result.dtype();
  call.require(shape.out == shape.dtype || shape.out == Dtype::kF32, "out",
               "must be fp32 or of the dtype of x");
  StreamParams params{};
  if (bias) params.bias = call.floats("bias", *bias, {shape.columns}, shape.dtype, false).data();
  params.out = result.data();
  params.rows = shape.rows;
  params.columns = shape.columns;
  params.steps = shape.inputs / kStreamPanel;
  params.plan = plan_stream_linear(shape);
  if (wanted.groups > 0) params.plan.groups = wanted.groups;
  if (wanted.splits > 0) params.plan.splits = wanted.splits;
  call.require(params.plan.groups <= 2, "groups", "must be 1 or 2, got ", params.plan.groups);
  const int most = params.steps < kStreamMaxSplits ? params.steps : kStreamMaxSplits;
  call.require(params.plan.splits <= most, "splits", "must be at most ", most, ", got ",
               params.plan.splits);
  launch_stream_linear(params, shape, input.data(), weights.data(), call.stream());
}

void stream_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& out, int64_t groups, int64_t splits) {
  Call call("stream_linear");
  run(call, x, weight, bias, out, false, {int(groups), int(splits)});
}

void stream_linear_silu_mul(const Tensor& x, const Tensor& weight, const Tensor& out,
                            int64_t groups, int64_t splits) {
  Call call("stream_linear_silu_mul");
  run(call, x, weight, std::nullopt, out, true, {int(groups), int(splits)});
}

bool stream_linear_serves_like(const Tensor& like) {
  Call call("stream_linear_serves");
  call.floats("like", like, {kAny});
  return stream_linear_serves();
}

}  // namespace
}  // namespace dendrite

DENDRITE_OPS(m) {
  m.impl("stream_linear", TORCH_BOX(&dendrite::stream_linear));
  m.impl("stream_linear_silu_mul", TORCH_BOX(&dendrite::stream_linear_silu_mul));
  m.impl("stream_linear_serves", TORCH_BOX(&dendrite::stream_linear_serves_like));
}
