// Runs the blocks of a grid one after another, every thread of a block as a fiber. A thread runs
// until it waits for others (a warp collective, a block barrier) or returns; then the next thread
// of its warp that can run does, then the next warp. Nothing depends on time: a run can be
// repeated.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_names.h"
#include "fiber.h"
#include "stacks.h"

namespace dendrite::emulator {

constexpr unsigned kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr uint32_t kEveryLane = 0xffffffffu;

enum class Wait : uint8_t {
  kNothing,
  kSyncBlock,
  kSyncWarp,
  kShflXor,
  kShfl,
  kShflUp,
  kShflDown,
  kBallot,
  kAny,
  kAll,
  kLdmatrixX4,
  kLdmatrixX2,
  kLdmatrixX4Trans,
  kLdmatrixX2Trans,
  kTranspose,
  kMmaBf16,
  kMmaF16,
};

// The caller's place in the source, where it is known.
struct Place {
  const char* file = nullptr;
  int line = 0;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// What threads meet in. All that do have to agree in everything: on a GPU those that don't hang, or
// get each other's data.
struct Meeting {
  Wait wait = Wait::kNothing;
  uint32_t bytes = 0;  // of the values exchanged
  Place place{};

  bool operator==(const Meeting& other) const {
    return wait == other.wait && bytes == other.bytes && place.line == other.place.line;
  }
};

// In which order blocks, warps and lanes run. Forward shows a thread what lower threads wrote even
// without a barrier, backward what higher ones wrote; shuffled picks the next thread at random,
// always the same for a seed. A kernel has to be right under all of them.
enum class Order : uint8_t { kForward, kBackward, kShuffled };

struct Copy {
  char* to;
  const char* from;
  int valid;
};

struct Fiber {
  Context context{};
  uint32_t thread = 0, lane = 0, warp = 0;
  Meeting meeting{};             // what it waits for
  std::vector<Copy> copies;      // cp_async that have not happened yet
  std::vector<uint32_t> groups;  // ends, in copies, of the groups committed
};

// Masks of lanes.
struct Warp {
  uint32_t alive = 0;    // have not returned
  uint32_t ready = 0;    // can run, and don't
  uint32_t arrived = 0;  // wait in the collective
  uint32_t blocked = 0;  // wait in sync_block
  Meeting meeting{};     // the collective
  void* arguments[32] = {};
};

class Machine {
 public:
  // Runs body(argument) once for every thread of the grid. Throws what a thread threw.
  void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument,
           std::string kernel);
  void set_order(Order order, uint64_t seed);

  // Waits for the other lanes of the warp. The last to come calls complete(arguments), a void*[32],
  // for all of them, and goes on first.
  template <class Complete>
  void meet_warp(const Meeting& meeting, void* argument, Complete complete) {
    Warp& warp = warps_[current_->warp];
    const uint32_t bit = 1u << current_->lane;
    if (warp.alive != kEveryLane) fail_incomplete(meeting);
    if (warp.arrived == 0) warp.meeting = meeting;
    if (!(warp.meeting == meeting)) fail_mixed(meeting, warp.meeting);
    warp.arguments[current_->lane] = argument;
    warp.arrived |= bit;
    if (warp.arrived == kEveryLane) {
      complete(warp.arguments);
      warp.arrived = 0;
      warp.ready = kEveryLane & ~bit;
    } else {
      wait_for(meeting);
    }
  }
  // Waits for all threads of the block that have not returned.
  void meet_block(const Meeting& meeting);

  Fiber& current() { return *current_; }
  char* shared_memory() const { return shared_; }
  size_t shared_bytes() const { return shared_bytes_; }
  // Is there room for `bytes` in shared memory at this address?
  bool is_shared(const void* address, size_t bytes = 1) const {
    const char* p = static_cast<const char*>(address);
    return p >= shared_ && p <= shared_ + shared_bytes_ &&
           size_t(shared_ + shared_bytes_ - p) >= bytes;
  }
  // Throws std::runtime_error that names the kernel, the block and the thread.
  [[noreturn]] void fail(const std::string& what) const;

 private:
  static constexpr size_t kRedZone = 1024;  // bytes on both sides of shared memory, checked

  static void fiber_main();
  void check_launch(dim3 grid, dim3 block, size_t shared_bytes) const;
  void run_block();
  void prepare_fibers();
  void prepare_shared(size_t bytes);
  void check_red_zones() const;
  void leave();
  void release_barrier();
  void wait_for(const Meeting& meeting);
  void yield();
  Fiber* next_ready();
  unsigned first_lane(uint32_t ready);
  uint64_t random();

  std::string where() const;
  [[noreturn]] void fail_incomplete(const Meeting& meeting) const;
  [[noreturn]] void fail_mixed(const Meeting& mine, const Meeting& others) const;
  [[noreturn]] void fail_deadlock() const;

  Fiber* current_ = nullptr;
  Warp warps_[kMaxWarps];
  Meeting barrier_{};
  unsigned num_warps_ = 0, num_threads_ = 0, alive_ = 0, blocked_ = 0;
  Order order_ = Order::kForward;
  uint64_t seed_ = 0, state_ = 0;
  char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::string kernel_;
  std::exception_ptr error_;
  Context main_{};
  Stacks stacks_;
  std::vector<std::unique_ptr<Fiber>> fibers_;  // between blocks all idle in fiber_main
  std::unique_ptr<char[]> memory_;
  std::mutex lock_;  // one grid at a time
};

DENDRITE_HIDDEN inline Machine machine;

}  // namespace dendrite::emulator

#include "machine_errors.h"
#include "machine_run.h"
