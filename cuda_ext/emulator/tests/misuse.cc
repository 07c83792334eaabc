// Wrong kernels, and what the emulator makes of them. The first cases end with the error that the
// emulator throws, and its message; the cases after them check themselves what comes out.
#include <cmath>

#include "check.h"

namespace dendrite::test {

using emulator::Order;

DENDRITE_KERNEL some_skip_barrier() {
  if (blockIdx.x == 0 || threadIdx.x < 40) {
    sync_block();
  } else if (threadIdx.x < 64) {
    sync_warp();
  }
}
void deadlock() { emulate(some_skip_barrier, 2, 96, 0); }

DENDRITE_KERNEL barriers_at_two_places() {
  if (threadIdx.x < 32) {
    sync_block();
  } else {
    sync_block();
  }
}
void two_barriers() { emulate(barriers_at_two_places, 1, 64, 0); }

DENDRITE_KERNEL half_shuffle() {
  if (threadIdx.x % 32 < 16) {
    shfl(1, 0);
  } else {
    ballot(true);
  }
}
void mixed_lanes() { emulate(half_shuffle, 1, 64, 0); }

DENDRITE_KERNEL two_sizes() {
  if (threadIdx.x == 0) {
    shfl(1.0, 0);
  } else {
    shfl(1.0f, 0);
  }
}
void mixed_sizes() { emulate(two_sizes, 1, 32, 0); }

DENDRITE_KERNEL lane_returns() {
  if (threadIdx.x == 37) return;
  shfl_xor(1, 1);
}
void returned_lane() { emulate(lane_returns, 1, 64, 0); }

DENDRITE_KERNEL late_return() {
  if (threadIdx.x != 31) shfl_xor(1, 1);
}
void returns_last() { emulate(late_return, 1, 32, 0); }

DENDRITE_KERNEL sums() { warp_sum(1.0f); }
void partial_warp() { emulate(sums, 1, 48, 0); }

DENDRITE_KERNEL load_rows(int stride) {
  DENDRITE_SHARED_MEMORY(char, smem);
  uint32_t r[4];
  ldmatrix_x4(r, smem + int(threadIdx.x) * stride);
}
void ldmatrix_range() { emulate(load_rows, 1, 32, 512, 32); }
void ldmatrix_alignment() { emulate(load_rows, 1, 32, 512, 8); }

DENDRITE_KERNEL copy_one(const char* from, int at, int valid) {
  DENDRITE_SHARED_MEMORY(char, smem);
  if (threadIdx.x == 33) cp_async_16(smem + at, from, valid);
}
alignas(16) char global[64];
void copy_range() { emulate(copy_one, dim3(1, 1, 1), 64, 200, global, 192, 16); }
void copy_before() { emulate(copy_one, 1, 64, 512, global, -16, 16); }
void copy_alignment() { emulate(copy_one, 1, 64, 512, global, 8, 16); }
void copy_source() { emulate(copy_one, 1, 64, 512, global + 4, 16, 16); }
void copy_length() { emulate(copy_one, 1, 64, 512, global, 16, 17); }

DENDRITE_KERNEL move(const char* from, char* to, bool global_load) {
  store_16(to, global_load ? load_global_16(from) : load_16(from));
}
void load_alignment() { emulate(move, 1, 1, 0, global + 8, global, false); }
void global_load_alignment() { emulate(move, 1, 1, 0, global + 8, global, true); }
void store_alignment() { emulate(move, 1, 1, 0, global, global + 4, false); }

DENDRITE_KERNEL load_shared_as_global() {
  DENDRITE_SHARED_MEMORY(char, smem);
  load_global_16(smem);
}
void wrong_space() { emulate(load_shared_as_global, 1, 1, 16); }

DENDRITE_KERNEL write_shared(int at) {
  DENDRITE_SHARED_MEMORY(char, smem);
  smem[at] = 1;
}
void write_past_end() { emulate(write_shared, dim3(1, 2), 32, 100, 101); }
void write_before() { emulate(write_shared, 1, 32, 100, -2); }

DENDRITE_KERNEL nothing() {}
void empty_grid() { emulate(nothing, 0, 32, 0); }
void large_block() { emulate(nothing, 1, 1025, 0); }
void flat_block() { emulate(nothing, 1, dim3(32, 2), 0); }
void much_shared() { emulate(nothing, 1, 32, 300000); }

// What a kernel that forgets something computes: the cases below expect NaN or an old value.

template <int kCommits, int kWaitFor, bool kWaits>
DENDRITE_KERNEL careless_copy(const float* from, float* to) {
  DENDRITE_SHARED_MEMORY(float, shared);
  for (int i = 0; i < 4; ++i) shared[4 * threadIdx.x + i] = 7.0f;
  cp_async_16(shared + 4 * threadIdx.x, from + 4 * threadIdx.x, 16);
  if (kCommits > 0) cp_async_commit();
  if (kWaits) cp_async_wait<kWaitFor>();
  to[threadIdx.x] = shared[4 * threadIdx.x];
}
template <int kCommits, int kWaitFor, bool kWaits>
float first_of_copy() {
  Array<float> from(128), to(32);
  for (int i = 0; i < 128; ++i) from[i] = 1.0f;
  emulate(careless_copy<kCommits, kWaitFor, kWaits>, 1, 32, 512, from, to);
  return to[0];
}
void late_copies() {
  expect(std::isnan(first_of_copy<1, 0, false>()), "NaN without a wait");
  expect(std::isnan(first_of_copy<1, 1, true>()), "NaN after a wait that lets it go on");
  expect(std::isnan(first_of_copy<0, 0, true>()), "NaN without a commit");
  expect_equal(first_of_copy<1, 0, true>(), 1.0f, "copied");
}

// Every thread waits for its own copy and reads its neighbour's, with or without a barrier between.
DENDRITE_KERNEL read_neighbour(const float* from, float* to, bool barrier) {
  DENDRITE_SHARED_MEMORY(float, shared);
  const unsigned i = threadIdx.x;
  cp_async_16(shared + 4 * i, from + 4 * i, 16);
  cp_async_commit();
  sync_block();
  cp_async_wait<0>();
  if (barrier) sync_block();
  to[i] = shared[4 * ((i + 1) % blockDim.x)];
}
void neighbours_copies() {
  Array<float> from(256), to(64);
  for (int i = 0; i < 256; ++i) from[i] = float(i);
  emulate(read_neighbour, 1, 64, 1024, from, to, false);
  expect(std::isnan(to[0]), "the neighbour's copy is late");
  emulate(read_neighbour, 1, 64, 1024, from, to, true);
  for (int i = 0; i < 64; ++i) expect_equal(to[i], float(4 * (i + 1) % 256), "copied", i);
}

DENDRITE_KERNEL keep_shared(float* out) {
  DENDRITE_SHARED_MEMORY(float, shared);
  out[blockIdx.x * 32 + threadIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 1.0f;
}
void fresh_shared() {
  Array<float> out(64);
  emulate(keep_shared, 2, 32, 128, out);
  for (int i = 0; i < 64; ++i) expect(std::isnan(out[i]), "shared memory holds NaN");
}

// Reads what a neighbour wrote, without a barrier: right for one order only.
DENDRITE_KERNEL race(int* out, int distance) {
  DENDRITE_SHARED_MEMORY(int, shared);
  const int i = int(threadIdx.x), other = i + distance;
  shared[i] = i;
  out[i] = other < 0 || other >= 64 ? other : shared[other];
}
bool race_shows(Order order, int distance) {
  Array<int> out(64);
  emulator::set_order(order);
  emulate(race, 1, 64, 256, out, distance);
  int wrong = 0;
  for (int i = 0; i < 64; ++i) wrong += out[i] != i + distance;
  return wrong > 0;
}
void orders() {
  expect(race_shows(Order::kForward, 1) && !race_shows(Order::kForward, -1), "forward");
  expect(race_shows(Order::kBackward, -1) && !race_shows(Order::kBackward, 1), "backward");
  expect(race_shows(Order::kShuffled, 1) && race_shows(Order::kShuffled, -1), "shuffled");
}

// A grid that ended early leaves nothing behind.
void recovery() {
  for (int i = 0; i < 50; ++i) {
    try {
      deadlock();
      expect(false, "the deadlock was noticed");
    } catch (const std::runtime_error&) {
    }
    fresh_shared();
    neighbours_copies();
  }
}

void device_size() {
  expect_equal(num_multiprocessors(), 4, "multiprocessors");
  expect_equal(max_blocks_per_multiprocessor(nothing, 32, 0), 2, "blocks");
  emulator::set_device(132, 3);
  expect_equal(num_multiprocessors(), 132, "multiprocessors");
  expect_equal(max_blocks_per_multiprocessor(nothing, 32, 0), 3, "blocks");
}

}  // namespace dendrite::test

int main(int count, char** names) {
  using namespace dendrite::test;
  return run_cases({{"deadlock", deadlock},
                    {"two_barriers", two_barriers},
                    {"mixed_lanes", mixed_lanes},
                    {"mixed_sizes", mixed_sizes},
                    {"returned_lane", returned_lane},
                    {"returns_last", returns_last},
                    {"partial_warp", partial_warp},
                    {"ldmatrix_range", ldmatrix_range},
                    {"ldmatrix_alignment", ldmatrix_alignment},
                    {"copy_range", copy_range},
                    {"copy_before", copy_before},
                    {"copy_alignment", copy_alignment},
                    {"copy_source", copy_source},
                    {"copy_length", copy_length},
                    {"load_alignment", load_alignment},
                    {"global_load_alignment", global_load_alignment},
                    {"store_alignment", store_alignment},
                    {"wrong_space", wrong_space},
                    {"write_past_end", write_past_end},
                    {"write_before", write_before},
                    {"empty_grid", empty_grid},
                    {"large_block", large_block},
                    {"flat_block", flat_block},
                    {"much_shared", much_shared},
                    {"late_copies", late_copies},
                    {"neighbours_copies", neighbours_copies},
                    {"fresh_shared", fresh_shared},
                    {"orders", orders},
                    {"recovery", recovery},
                    {"device_size", device_size}},
                   count, names);
}
