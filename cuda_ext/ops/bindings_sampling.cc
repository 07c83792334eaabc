// sample and top_logprobs as torch ops.
#include "bindings_common.h"
#include "sampling.h"

namespace dendrite {
namespace {

struct Logits {
  const float* data;
  int64_t stride;
  int rows, vocab;
};

// Rows of logits may lie apart, so they can't go through Call::floats; its device is that of the
// arguments before.
Logits strided(Call& call, const Tensor& logits) {
  call.require(logits.scalar_type() == ScalarType::Float, "logits", "must be fp32, got ",
               torch::headeronly::toString(logits.scalar_type()));
  call.require(logits.dim() == 2, "logits", "must have 2 dimensions, got ", logits.dim());
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  call.require(vocab >= 1 && vocab <= kMaxSamplingVocab, "logits", "must have 1 to ",
               kMaxSamplingVocab, " columns, got ", vocab);
  call.require(rows <= std::numeric_limits<int32_t>::max(), "logits", "has too many rows: ", rows);
  call.require((vocab == 1 || logits.stride(1) == 1) && (rows <= 1 || logits.stride(0) >= vocab),
               "logits", "must be contiguous inside a row");
  return {static_cast<const float*>(logits.data_ptr()), rows <= 1 ? vocab : logits.stride(0),
          int(rows), int(vocab)};
}

void check_device(Call& call, const Tensor& logits, const Tensor& other, const char* name) {
  call.require(logits.is_cuda() == other.is_cuda() &&
                   logits.get_device_index() == other.get_device_index(),
               "logits", "must be on the device of ", name);
}

void sample(const Tensor& logits, const Tensor& params, const Tensor& workspace, const Tensor& out,
            const std::optional<Tensor>& previous, bool greedy, int64_t blocks) {
  Call call("sample");
  const Argument result = call.ints("out", out, {2, kAny});
  const Argument packed = call.ints("params", params, {kAny});
  const Argument memory = call.typed("workspace", workspace, {kAny}, ScalarType::Byte, true);
  const Logits x = strided(call, logits);
  check_device(call, logits, out, "out");
  const size_t wanted = sampling_workspace_bytes(x.vocab);
  call.require(size_t(memory.size(0)) >= wanted, "workspace", "must have at least ", wanted,
               " bytes for a vocabulary of ", x.vocab, ", got ", memory.size(0));
  call.require(packed.size(0) >= kSamplingHeaderWords, "params", "must start with a header of ",
               kSamplingHeaderWords, " words, got ", packed.size(0));
  SampleCall arguments{};
  if (previous) {
    const Argument tokens = call.ints("previous", *previous, {kAny});
    arguments.previous = tokens.as<int>();
    arguments.previous_count = tokens.size(0);
  }
  arguments.logits = x.data;
  arguments.stride = x.stride;
  arguments.num_logits = x.rows;
  arguments.vocab = x.vocab;
  arguments.params = packed.as<int>();
  arguments.workspace = memory.data();
  arguments.workspace_bytes = size_t(memory.size(0));
  arguments.rows = result.size(1);
  arguments.tokens = result.as<int>();
  arguments.logprobs = result.as<float>() + result.size(1);
  arguments.greedy = greedy;
  arguments.blocks = int(blocks);
  launch_sample(arguments, call.stream());
}

void top_logprobs(const Tensor& logits, int64_t k, const Tensor& ids, const Tensor& logprobs,
                  const std::optional<Tensor>& rows) {
  Call call("top_logprobs");
  const Argument out_ids = call.ints("ids", ids, {kAny, k});
  const int count = out_ids.size(0);
  const Argument out = call.floats("logprobs", logprobs, {count, k}, Dtype::kF32, false);
  const Logits x = strided(call, logits);
  check_device(call, logits, ids, "ids");
  call.require(k >= 1 && k <= x.vocab, "k", "must be in 1..", x.vocab, ", got ", k);
  TopCall arguments{};
  if (rows)
    arguments.rows = call.ints("rows", *rows, {count}).as<int>();
  else
    call.require(count == x.rows, "ids", "must have ", x.rows, " rows, got ", count);
  arguments.logits = x.data;
  arguments.stride = x.stride;
  arguments.num_logits = x.rows;
  arguments.vocab = x.vocab;
  arguments.num_rows = count;
  arguments.k = int(k);
  arguments.ids = out_ids.as<int>();
  arguments.logprobs = out.as<float>();
  launch_top_logprobs(arguments, call.stream());
}

}  // namespace
}  // namespace dendrite

DENDRITE_OPS(m) {
  m.impl("sample", TORCH_BOX(&dendrite::sample));
  m.impl("top_logprobs", TORCH_BOX(&dendrite::top_logprobs));
}
