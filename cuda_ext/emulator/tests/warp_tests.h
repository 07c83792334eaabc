// Shuffles, votes, reductions and barriers.
#pragma once

#include "check.h"

namespace dendrite::test {

template <class T>
DENDRITE_KERNEL shuffle(T* out, T factor) {
  const int i = int(threadIdx.x);
  const T value = T(i) * factor;
  T* own = out + 6 * i;
  own[0] = shfl_xor(value, 5);
  own[1] = shfl(value, (i + 7) % 32);
  own[2] = shfl_up(value, 3);
  own[3] = shfl_down(value, 3);
  own[4] = warp_sum(value);
  own[5] = warp_max(i % 2 == 0 ? value : T(0));
}

template <class T>
void check_shuffles(T factor) {
  Array<T> out(6 * 96);
  run(shuffle<T>, 1, 96, 0, static_cast<T*>(out), factor);
  for (int i = 0; i < 96; ++i) {
    const int first = i / 32 * 32, lane = i % 32;
    const int sources[4] = {i ^ 5, first + (i + 7) % 32, lane < 3 ? i : i - 3,
                            lane > 28 ? i : i + 3};
    for (int j = 0; j < 4; ++j)
      expect_equal(out[6 * i + j], T(sources[j]) * factor, "shuffle", 10 * i + j);
    expect_equal(out[6 * i + 4], T(32 * first + 496) * factor, "sum", i);
    expect_equal(out[6 * i + 5], T(first + 30) * factor, "max", i);
  }
}

inline void shuffles() {
  check_shuffles<int>(3);
  check_shuffles<uint32_t>(0x80001u);
  check_shuffles<float>(0.25f);
  check_shuffles<double>(1.0 + 0x1p-40);
  check_shuffles<uint64_t>((uint64_t(1) << 40) + 1);
}

DENDRITE_KERNEL vote(uint32_t* out) {
  const unsigned i = threadIdx.x;
  uint32_t* own = out + 6 * i;
  own[0] = ballot(i % 3 == 0);
  own[1] = any_sync(i == 40);
  own[2] = all_sync(i != 40);
  own[3] = any_sync(false);
  own[4] = all_sync(true);
  own[5] = ballot(true);
}

inline void votes() {
  Array<uint32_t> out(6 * 64);
  run(vote, 1, 64, 0, static_cast<uint32_t*>(out));
  for (unsigned i = 0; i < 64; ++i) {
    uint32_t thirds = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
      thirds |= uint32_t((i / 32 * 32 + lane) % 3 == 0) << lane;
    const uint32_t wanted[6] = {thirds, i >= 32, i < 32, 0, 1, 0xffffffffu};
    for (unsigned j = 0; j < 6; ++j) expect_equal(out[6 * i + j], wanted[j], "vote", 10 * i + j);
  }
}

// Values go round the block, one place a turn, through shared memory.
DENDRITE_KERNEL rotate(int* out, int turns) {
  DENDRITE_SHARED_MEMORY(int, shared);
  const unsigned i = threadIdx.x, last = blockDim.x - 1;
  int value = int(i + 1000 * blockIdx.x);
  for (int turn = 0; turn < turns; ++turn) {
    shared[i] = value;
    sync_block();
    value = shared[i == last ? 0 : i + 1];
    sync_block();
  }
  out[blockIdx.x * blockDim.x + i] = value;
}

// Only the first `stay` threads take part; the others return at once.
DENDRITE_KERNEL rotate_few(int* out, unsigned stay) {
  DENDRITE_SHARED_MEMORY(int, shared);
  const unsigned i = threadIdx.x;
  if (i >= stay) return;
  shared[i] = int(i);
  sync_block();
  out[i] = shared[stay - 1 - i];
}

DENDRITE_KERNEL rotate_in_warp(int* out) {
  DENDRITE_SHARED_MEMORY(int, shared);
  const unsigned i = threadIdx.x;
  shared[i] = int(i);
  sync_warp();
  out[i] = shared[i / 32 * 32 + (i + 9) % 32];
}

inline void barriers() {
  Array<int> out(3 * 1024);
  for (int threads : {1, 33, 256, 1024}) {
    run(rotate, 3, threads, size_t(threads) * sizeof(int), static_cast<int*>(out), 5);
    for (int i = 0; i < 3 * threads; ++i)
      expect_equal(out[i], (i % threads + 5) % threads + 1000 * (i / threads), "rotated", i);
  }
  for (int stay : {1, 32, 40, 128}) {
    run(rotate_few, 1, 128, 512, static_cast<int*>(out), unsigned(stay));
    for (int i = 0; i < stay; ++i) expect_equal(out[i], stay - 1 - i, "of few", i);
  }
  run(rotate_in_warp, 1, 128, 512, static_cast<int*>(out));
  for (int i = 0; i < 128; ++i) expect_equal(out[i], i / 32 * 32 + (i + 9) % 32, "in a warp", i);
}

}  // namespace dendrite::test
