#include "sampling.h"

#include <algorithm>

#include "../include/dendrite/sampling.cuh"
#include "../include/dendrite/sampling_top.cuh"
#include "launch.h"

namespace dendrite {
namespace {

using namespace sampling;

static_assert(kMaxSamplingVocab == kMaxVocab && kSamplingHeaderWords * 4 == sizeof(Header));

// At most what the launch bounds of a kernel say.
int threads_for(int vocab, int most) { return vocab <= 4096 ? 128 : most; }

size_t shared_bytes(size_t fixed, int vocab) {
  return fixed + (size_t(vocab + 31) / 32 * sizeof(uint32_t) + 15) / 16 * 16;
}

// Blocks per row: several when there are too few rows to fill the device, with at least eight tiles
// each. A result does not depend on it.
int choose_blocks(const SampleCall& call) {
  const int tiles = tiles_of(call.vocab);
  int blocks = call.blocks;
  if (blocks == 0) blocks = std::min(2 * num_multiprocessors() / call.rows, (tiles + 7) / 8);
  return std::clamp(blocks, 1, std::min(tiles, kMaxBlocks));
}

}  // namespace

size_t sampling_workspace_bytes(int vocab) { return workspace_bytes(vocab); }

void launch_sample(const SampleCall& call, cudaStream_t stream) {
  if (call.rows == 0) return;
  const int vocab = call.vocab, blocks = choose_blocks(call);
  const int room = int(std::min<size_t>(call.workspace_bytes / workspace_bytes(vocab), 1 << 16));
  SampleArgs args{call.logits,
                  call.stride,
                  call.params,
                  call.previous,
                  call.previous_count,
                  call.num_logits,
                  vocab,
                  0,
                  static_cast<unsigned char*>(call.workspace),
                  call.tokens,
                  call.logprobs,
                  (tiles_of(vocab) + blocks - 1) / blocks};
  for (; args.first_row < call.rows; args.first_row += room) {
    const dim3 grid(std::min(room, call.rows - args.first_row), blocks);
    const auto start = [&](auto* kernel, int threads, size_t fixed) {
      launch_kernel(kernel, grid, dim3(threads_for(vocab, threads)), shared_bytes(fixed, vocab),
                    stream, true, args);
    };
    start(sample_scan, 512, kScanBytes);
    if (call.greedy) continue;
    start(sample_count, 512, kCountBytes);
    start(sample_finish, 256, kFinishBytes);
  }
}

void launch_top_logprobs(const TopCall& call, cudaStream_t stream) {
  if (call.num_rows == 0) return;
  const TopArgs args{call.logits, call.stride, call.rows, call.num_logits,
                     call.vocab,  call.k,      call.ids,  call.logprobs};
  launch_kernel(top_rows, dim3(call.num_rows), dim3(threads_for(call.vocab, 512)),
                shared_bytes(sizeof(Shared), call.vocab), stream, true, args);
}

}  // namespace dendrite
