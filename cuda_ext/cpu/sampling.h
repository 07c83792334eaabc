// Token sampling and top log-probabilities over rows of raw logits.
#pragma once

#include <cstdint>

#include "context.h"

namespace dendrite {

// Arrays of one batch; see kernels/sampling_batch.py for what each means. Row i of a CSR pair is
// ids[indptr[i] .. indptr[i + 1]].
struct SamplingArrays {
  const float* temperature;  // [rows]
  const int32_t* top_k;      // [rows]
  const float* top_p;        // [rows]
  const float* min_p;        // [rows]
  const double* uniform;     // [rows]
  const float* repetition;   // [rows]
  const float* presence;     // [rows]
  const float* frequency;    // [rows]
  const int32_t* pen_indptr;  // [rows + 1]
  const int32_t* pen_ids;
  const int32_t* pen_counts;
  const int32_t* bias_indptr;  // [rows + 1]
  const int32_t* bias_ids;
  const float* bias_values;
  const int32_t* mask;  // [rows, ceil(vocab / 32)] or null
};

// logits [rows, vocab], rows `stride` floats apart -> tokens [rows] (-1: nothing to sample from),
// logprobs [rows] (log-softmax of the raw logits at the token, NaN with token -1).
// Throws std::invalid_argument when a CSR token id is outside the vocabulary.
void sample(Context& context, const float* logits, int64_t rows, int vocab, int64_t stride,
            const SamplingArrays& arrays, int32_t* tokens, float* logprobs);

// The k most likely tokens of every row, value descending and id ascending:
// ids [rows, k], logprobs [rows, k] (log-softmax); -1 and NaN in a row with NaN or Inf.
void top_logprobs(Context& context, const float* logits, int64_t rows, int vocab, int64_t stride,
                  int k, int32_t* ids, float* logprobs);

}  // namespace dendrite
