// Launchers of sampling; the arguments are described in sampling.cuh and sampling_top.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace dendrite {

struct SampleCall {
  const float* logits;  // [num_logits, vocab], rows `stride` floats apart
  int64_t stride;
  int num_logits, vocab;
  const int* params;    // as sampling_pack.py packs it
  const int* previous;  // or null
  int previous_count;
  void* workspace;  // zero before its first use
  size_t workspace_bytes;  // at least sampling_workspace_bytes(vocab): of one row
  int rows;         // of the result
  int* tokens;      // [rows]
  float* logprobs;  // [rows]
  bool greedy;      // every row is: only the first pass runs
  int blocks;       // per row; 0: chosen here
};

struct TopCall {
  const float* logits;
  int64_t stride;
  int num_logits, vocab;
  const int* rows;  // [num_rows], or null
  int num_rows, k;
  int* ids;         // [num_rows, k]
  float* logprobs;  // [num_rows, k]
};

constexpr int kMaxSamplingVocab = 1 << 19, kSamplingHeaderWords = 16;
// Of one row; with room for fewer rows than there are, they are done one after another.
size_t sampling_workspace_bytes(int vocab);
void launch_sample(const SampleCall& call, cudaStream_t stream);
void launch_top_logprobs(const TopCall& call, cudaStream_t stream);

}  // namespace dendrite
