// Tests of device.cuh and launch.h that hold on a GPU and in the emulator alike. Arguments: names
// of cases; in the emulator "forward", "backward" or "shuffled" before them.
#include <cmath>

#include "check.h"
#include "number_tests.h"
#include "tensor_tests.h"
#include "warp_tests.h"

namespace dendrite::test {

// Copies 16 bytes per thread in each of three groups; waits for two, then for the last.
DENDRITE_KERNEL copy_groups(const char* in, char* out) {
  DENDRITE_SHARED_MEMORY(char, smem);
  const int i = int(threadIdx.x), bytes = 16 * int(blockDim.x);
  for (int group = 0; group < 3; ++group) {
    const int at = group * bytes + 16 * i;
    cp_async_16(smem + at, in + at, group == 1 ? i % 17 : 16);
    cp_async_commit();
  }
  cp_async_wait<1>();
  sync_block();
  for (int group = 0; group < 2; ++group) {
    const int other = group * bytes + 16 * (int(blockDim.x) - 1 - i);
    store_16(out + other, load_16(smem + other));
  }
  cp_async_wait<0>();
  store_16(out + 2 * bytes + 16 * i, load_16(smem + 2 * bytes + 16 * i));
}

void copies() {
  constexpr int kThreads = 64, kBytes = 3 * 16 * kThreads;
  Array<char> in(kBytes), out(kBytes);
  for (int i = 0; i < kBytes; ++i) in[i] = char(1 + i % 113);
  run(copy_groups, 1, kThreads, kBytes, static_cast<const char*>(in), static_cast<char*>(out));
  for (int i = 0; i < kBytes; ++i) {
    const int thread = i / 16 % kThreads;
    const bool valid = i / (16 * kThreads) != 1 || i % 16 < thread % 17;
    expect_equal(int(out[i]), valid ? int(in[i]) : 0, "byte", i);
  }
}

// Every block adds its part; the last to come adds the parts up.
DENDRITE_KERNEL add_up(const int* in, int* parts, int* counter, int* out) {
  grid_dependency_wait();
  const uint4 four = load_global_16(in + 4 * (blockIdx.x * 32 + threadIdx.x));
  const int sum = warp_sum(int(four.x + four.y + four.z + four.w));
  int ticket = 0;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = sum;
    thread_fence();
    ticket = atomic_add(counter, 1);
    thread_fence();
  }
  if (shfl(ticket, 0) != int(gridDim.x) - 1) return;
  int total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += 32) total += load_volatile(parts + i);
  total = warp_sum(total);
  if (threadIdx.x == 0) *out = total + 1000000 * load_acquire(counter);
  grid_dependency_launch();
}

DENDRITE_KERNEL add_one(int* value) {
  grid_dependency_launch();
  grid_dependency_wait();
  *value += 1;
}

void atomics() {
  constexpr int kBlocks = 40;
  Array<int> in(kBlocks * 128), parts(kBlocks), counter(1), out(1);
  for (int i = 0; i < kBlocks * 128; ++i) in[i] = i % 7;
  int wanted = 1000000 * kBlocks;
  for (int i = 0; i < kBlocks * 128; ++i) wanted += in[i];
  run(add_up, kBlocks, 32, 0, static_cast<const int*>(in), static_cast<int*>(parts),
      static_cast<int*>(counter), static_cast<int*>(out));
  expect_equal(out[0], wanted, "total");
}

DENDRITE_KERNEL use_much(int* out, size_t bytes) {
  DENDRITE_SHARED_MEMORY(int, shared);
  const size_t count = bytes / sizeof(int);
  for (size_t i = threadIdx.x; i < count; i += blockDim.x) shared[i] = int(i);
  sync_block();
  if (threadIdx.x == 0)
    out[blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)] = shared[count - 1];
}

std::string message_of(void (*function)()) {
  try {
    function();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void launches() {
  Array<int> out(24);
  launch_kernel(use_much, dim3(2, 3, 4), 64, 90000, nullptr, true, static_cast<int*>(out), 90000);
  finish();
  for (int i = 0; i < 24; ++i) expect_equal(out[i], 90000 / 4 - 1, "last", i);
  for (int i = 0; i < 10; ++i)
    launch_kernel(add_one, 1, 1, 0, nullptr, i > 0, static_cast<int*>(out));
  finish();
  expect_equal(out[0], 90000 / 4 + 9, "after ten kernels");
  expect(num_multiprocessors() > 0, "there are multiprocessors");
  expect(max_blocks_per_multiprocessor(use_much, 64, 90000) > 0, "a block fits");
  const std::string error = message_of(
      [] { launch_kernel(add_one, 1, 2000, 0, nullptr, false, static_cast<int*>(nullptr)); });
  expect(!error.empty(), "2000 threads are too many");
#ifndef DENDRITE_EMULATE
  expect(error.find("add_one") != std::string::npos, "the kernel is named: " + error);
  launch_kernel(add_one, 1, 1, 0, nullptr, false, static_cast<int*>(out));  // no error stays behind
  finish();
#endif
}

void types() {
  size_t bytes[3] = {};
  for (Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16})
    with_type(dtype, [&](auto zero) { bytes[int(dtype)] = sizeof zero; });
  for (Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16})
    expect_equal(int(bytes[int(dtype)]), element_bytes(dtype), "bytes", int(dtype));
}

#ifdef DENDRITE_EMULATE
void forward() { emulator::set_order(emulator::Order::kForward); }
void backward() { emulator::set_order(emulator::Order::kBackward); }
void shuffled() { emulator::set_order(emulator::Order::kShuffled, 5); }
#endif

}  // namespace dendrite::test

int main(int count, char** names) {
  using namespace dendrite::test;
  return run_cases(
      {
          {"numbers", numbers},
          {"math", math},
          {"shuffles", shuffles},
          {"votes", votes},
          {"barriers", barriers},
          {"matrices", matrices},
          {"products", products},
          {"copies", copies},
          {"atomics", atomics},
          {"launches", launches},
          {"types", types},
#ifdef DENDRITE_EMULATE
          {"forward", forward},
          {"backward", backward},
          {"shuffled", shuffled},
#endif
      },
      count, names);
}
