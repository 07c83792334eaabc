// Runs the blocks of a grid one after another, every thread of a block as a fiber. A thread runs
// until it waits for others (a warp collective, a block barrier) or returns; then the next thread
// of its warp that can run does, then the next warp. Nothing depends on time: a run can be repeated.
#pragma once

#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace dendrite::emulator {

constexpr unsigned kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr uint32_t kEveryLane = 0xffffffffu;

// What a thread waits for. Collectives of a warp have to be the same in all its lanes.
enum class Wait : uint8_t {
  kNothing, kBlock, kSyncWarp, kShflXor, kShfl, kShflUp, kShflDown, kBallot, kAny, kAll,
  kLdmatrixX4, kLdmatrixX2, kLdmatrixX4Trans, kLdmatrixX2Trans, kMmaBf16, kMmaF16
};  // clang-format off
inline const char* name_of(Wait wait) {
  static constexpr const char* names[] = {
      "nothing", "sync_block", "sync_warp", "shfl_xor", "shfl", "shfl_up", "shfl_down", "ballot",
      "any_sync", "all_sync", "ldmatrix_x4", "ldmatrix_x2", "ldmatrix_x4_trans",
      "ldmatrix_x2_trans", "mma_m16n8k16<bf16>", "mma_m16n8k16<half_t>"};
  return names[int(wait)];
}  // clang-format on

// In which order threads (and blocks) run. Forward shows a thread what lower threads wrote even
// without a barrier, backward what higher ones wrote: a kernel has to be right under both.
enum class Order : uint8_t { kForward, kBackward };

struct Copy {
  char* to;
  const char* from;
  int valid;
};

struct Fiber {
  Context context{};
  uint32_t thread = 0, lane = 0, warp = 0;
  Wait wait = Wait::kNothing;
  std::vector<Copy> copies;      // cp_async that have not happened yet
  std::vector<uint32_t> groups;  // ends, in copies, of the groups committed
};

struct Warp {
  uint32_t alive = 0;    // lanes that have not returned
  uint32_t ready = 0;    // lanes that can run
  uint32_t arrived = 0;  // lanes that wait in a collective
  uint32_t at_barrier = 0;
  Wait wait = Wait::kNothing;  // the collective
  uint32_t detail = 0;         // has to agree too, such as the size of the values
  void* arguments[32] = {};
};

class Machine {
 public:
  // Runs body(argument) once for every thread of the grid. Throws what a thread threw.
  void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument,
           const char* kernel);

  // Waits until all 32 lanes called this with the same `wait` and `detail`. The last lane to come
  // calls complete(arguments) for all of them, and goes on first.
  template <class Complete>
  void rendezvous(Wait wait, uint32_t detail, void* argument, Complete complete) {
    Warp& warp = warps_[current_->warp];
    const uint32_t bit = 1u << current_->lane;
    if (warp.alive != kEveryLane) fail_incomplete(wait);
    if (warp.arrived == 0) {
      warp.wait = wait;
      warp.detail = detail;
    } else if (warp.wait != wait || warp.detail != detail) {
      fail_mixed(wait);
    }
    warp.arguments[current_->lane] = argument;
    warp.arrived |= bit;
    if (warp.arrived == kEveryLane) {
      complete(warp.arguments);
      warp.arrived = 0;
      warp.ready = kEveryLane & ~bit;
    } else {
      current_->wait = wait;
      yield();
      current_->wait = Wait::kNothing;
    }
  }

  void sync_block();

  Fiber& current() { return *current_; }
  char* shared_memory() { return shared_; }
  size_t shared_bytes() const { return shared_bytes_; }
  bool is_shared(const void* address) const {
    const char* p = static_cast<const char*>(address);
    return p >= shared_ && p < shared_ + shared_bytes_;
  }
  // Throws std::runtime_error that names the kernel, the block and the thread.
  [[noreturn]] void fail(const std::string& what) const;
  void set_order(Order order) { order_ = order; }
  std::mutex& lock() { return lock_; }

 private:
  static constexpr size_t kRedZone = 1024;  // bytes on both sides of shared memory, checked

  static void fiber_main();
  void run_block();
  void prepare_fibers();
  void fill_shared();
  void check_red_zones() const;
  void leave();
  void release_barrier();
  void yield();
  Fiber* next_ready();
  std::string where(bool with_thread) const;
  [[noreturn]] void fail_incomplete(Wait wait) const;
  [[noreturn]] void fail_mixed(Wait wait) const;
  [[noreturn]] void fail_deadlock() const;

  Fiber* current_ = nullptr;
  Warp warps_[kMaxWarps];
  unsigned num_warps_ = 0, num_threads_ = 0, alive_ = 0, at_barrier_ = 0;
  Order order_ = Order::kForward;
  char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  const char* kernel_ = "";
  std::exception_ptr error_;
  Context main_{};
  Stacks stacks_;
  std::vector<std::unique_ptr<Fiber>> fibers_;  // prepared and idle between blocks
  std::unique_ptr<char[]> memory_;
  std::mutex lock_;
};

DENDRITE_HIDDEN inline Machine machine;

inline Fiber* Machine::next_ready() {
  const unsigned start = current_ == nullptr ? 0 : current_->warp;
  for (unsigned i = 0; i < num_warps_; ++i) {
    const unsigned step = order_ == Order::kForward ? i : num_warps_ - i;
    const unsigned w = (start + step) % num_warps_;
    const uint32_t ready = warps_[w].ready;
    if (ready == 0) continue;
    const int lane = order_ == Order::kForward ? __builtin_ctz(ready) : 31 - __builtin_clz(ready);
    warps_[w].ready = ready & ~(1u << lane);
    return fibers_[w * 32 + unsigned(lane)].get();
  }
  return nullptr;
}

// Lets the next thread run, or the machine when none can.
inline void Machine::yield() {
  Fiber* self = current_;
  Fiber* next = next_ready();
  current_ = next;
  if (next == nullptr) {
    switch_context(&self->context, &main_);
    return;
  }
  threadIdx.x = next->thread;
  if (next != self) switch_context(&self->context, &next->context);
}

inline void Machine::release_barrier() {
  for (unsigned w = 0; w < num_warps_; ++w) {
    warps_[w].ready |= warps_[w].at_barrier;
    warps_[w].at_barrier = 0;
  }
  at_barrier_ = 0;
}

inline void Machine::sync_block() {
  Warp& warp = warps_[current_->warp];
  const uint32_t bit = 1u << current_->lane;
  warp.at_barrier |= bit;
  if (++at_barrier_ == alive_) {
    release_barrier();
    warp.ready &= ~bit;
    return;
  }
  current_->wait = Wait::kBlock;
  yield();
  current_->wait = Wait::kNothing;
}

inline void Machine::leave() {
  Warp& warp = warps_[current_->warp];
  warp.alive &= ~(1u << current_->lane);
  if (warp.arrived != 0) fail_incomplete(warp.wait);
  if (--alive_ != 0 && at_barrier_ == alive_) release_barrier();
  current_->copies.clear();
  current_->groups.clear();
}

// Every fiber stays in this loop; a turn is one thread of one block.
inline void Machine::fiber_main() {
  for (;;) {
    try {
      machine.body_(machine.argument_);
      machine.leave();
    } catch (...) {
      machine.error_ = std::current_exception();
    }
    if (machine.error_) {
      Fiber* self = machine.current_;
      machine.current_ = nullptr;
      switch_context(&self->context, &machine.main_);
    } else {
      machine.yield();
    }
  }
}

inline void Machine::prepare_fibers() {
  while (fibers_.size() < num_threads_) {
    const unsigned i = unsigned(fibers_.size());
    fibers_.push_back(std::make_unique<Fiber>());
    fibers_[i]->thread = i;
    fibers_[i]->lane = i % 32;
    fibers_[i]->warp = i / 32;
    prepare(&fibers_[i]->context, stacks_.bottom(i), stacks_.size(i), &Machine::fiber_main);
  }
}

inline void Machine::fill_shared() {
  std::memset(shared_ - kRedZone, 0xff, shared_bytes_ + 2 * kRedZone);
}

inline void Machine::check_red_zones() const {
  for (size_t i = 1; i <= kRedZone; ++i) {
    if (shared_[-ptrdiff_t(i)] != char(0xff))
      fail("wrote " + std::to_string(i) + " bytes before shared memory");
    if (shared_[shared_bytes_ + i - 1] != char(0xff))
      fail("wrote at byte " + std::to_string(shared_bytes_ + i - 1) + " of shared memory of " +
           std::to_string(shared_bytes_) + " bytes");
  }
}

inline void Machine::run_block() {
  num_warps_ = (num_threads_ + 31) / 32;
  alive_ = num_threads_;
  at_barrier_ = 0;
  for (unsigned w = 0; w < num_warps_; ++w) {
    const unsigned lanes = num_threads_ - w * 32 < 32 ? num_threads_ - w * 32 : 32;
    warps_[w] = Warp{};
    warps_[w].alive = warps_[w].ready = kEveryLane >> (32 - lanes);
  }
  prepare_fibers();
  fill_shared();
  current_ = nullptr;
  current_ = next_ready();
  threadIdx.x = current_->thread;
  switch_context(&main_, &current_->context);
  current_ = nullptr;
  if (error_) std::rethrow_exception(error_);
  if (alive_ != 0) fail_deadlock();
  check_red_zones();
}

inline void Machine::run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                         void* argument, const char* kernel) {
  kernel_ = kernel;
  current_ = nullptr;
  blockIdx = {0, 0, 0};
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("launched with an empty grid");
  if (grid.y > 65535 || grid.z > 65535) fail("grid.y and grid.z may be at most 65535");
  if (block.x == 0 || block.x > kMaxThreads || block.y != 1 || block.z != 1)
    fail("a block is 1 to 1024 threads along x, got " + std::to_string(block.x) + " x " +
         std::to_string(block.y) + " x " + std::to_string(block.z));
  if (shared_bytes > kMaxSharedBytes)
    fail("asks for " + std::to_string(shared_bytes) + " bytes of shared memory, at most " +
         std::to_string(kMaxSharedBytes));
  if (!memory_) memory_ = std::make_unique<char[]>(kMaxSharedBytes + 2 * kRedZone + 128);
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory_.get()) + kRedZone;
  shared_ = reinterpret_cast<char*>((start + 127) & ~uintptr_t(127));
  shared_bytes_ = shared_bytes;
  body_ = body;
  argument_ = argument;
  gridDim = grid;
  blockDim = block;
  num_threads_ = block.x;
  error_ = nullptr;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  try {
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = order_ == Order::kForward ? i : blocks - 1 - i;
      blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y),
                  unsigned(b / grid.x / grid.y)};
      run_block();
    }
  } catch (...) {
    fibers_.clear();  // those that wait inside the kernel can't be used again
    error_ = nullptr;
    throw;
  }
}

}  // namespace dendrite::emulator

#include "block_errors.h"
