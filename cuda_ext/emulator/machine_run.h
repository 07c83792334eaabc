// How threads take turns, and blocks. Included by machine.h.
#pragma once

#include <cstring>
#include <utility>

#include "machine.h"

namespace dendrite::emulator {

inline void Machine::set_order(Order order, uint64_t seed) {
  const std::lock_guard<std::mutex> guard(lock_);
  order_ = order;
  seed_ = seed;
}

inline uint64_t Machine::random() {  // splitmix64
  uint64_t x = state_ += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

inline unsigned Machine::first_lane(uint32_t ready) {
  if (order_ == Order::kForward) return unsigned(__builtin_ctz(ready));
  if (order_ == Order::kBackward) return 31 - unsigned(__builtin_clz(ready));
  const unsigned shift = unsigned(random() % 32);
  const uint32_t rotated = ready >> shift | ready << (32 - shift) % 32;
  return (unsigned(__builtin_ctz(rotated)) + shift) % 32;
}

inline Fiber* Machine::next_ready() {
  unsigned start = order_ == Order::kBackward ? num_warps_ - 1 : 0;
  if (current_ != nullptr) start = current_->warp;
  if (order_ == Order::kShuffled) start = unsigned(random() % num_warps_);
  for (unsigned i = 0; i < num_warps_; ++i) {
    const unsigned step = order_ == Order::kBackward ? num_warps_ - i : i;
    const unsigned w = (start + step) % num_warps_;
    const uint32_t ready = warps_[w].ready;
    if (ready == 0) continue;
    const unsigned lane = first_lane(ready);
    warps_[w].ready = ready & ~(1u << lane);
    return fibers_[w * 32 + lane].get();
  }
  return nullptr;
}

// Lets the next thread run, or run_block() when none can.
inline void Machine::yield() {
  Fiber* self = current_;
  Fiber* next = next_ready();
  current_ = next;
  if (next == nullptr) {
    switch_context(&self->context, &main_);
  } else {
    threadIdx.x = next->thread;
    if (next != self) switch_context(&self->context, &next->context);
  }
}

inline void Machine::wait_for(const Meeting& meeting) {
  current_->meeting = meeting;
  yield();
}

inline void Machine::release_barrier() {
  for (unsigned w = 0; w < num_warps_; ++w) {
    warps_[w].ready |= warps_[w].blocked;
    warps_[w].blocked = 0;
  }
  blocked_ = 0;
}

inline void Machine::meet_block(const Meeting& meeting) {
  Warp& warp = warps_[current_->warp];
  const uint32_t bit = 1u << current_->lane;
  if (blocked_ == 0) barrier_ = meeting;
  if (!(barrier_ == meeting)) fail_mixed(meeting, barrier_);
  warp.blocked |= bit;
  if (++blocked_ == alive_) {
    release_barrier();
    warp.ready &= ~bit;
  } else {
    wait_for(meeting);
  }
}

// The current thread returned.
inline void Machine::leave() {
  Warp& warp = warps_[current_->warp];
  warp.alive &= ~(1u << current_->lane);
  if (warp.arrived != 0) fail_incomplete(warp.meeting);
  --alive_;
  if (blocked_ != 0 && blocked_ == alive_) release_barrier();
  current_->copies.clear();
  current_->groups.clear();
}

// Every fiber stays in this loop; a turn is one thread of one block.
inline void Machine::fiber_main() {
  finish_switch(nullptr);
  for (;;) {
    bool failed = false;
    try {
      machine.body_(machine.argument_);
      machine.leave();
    } catch (...) {
      machine.error_ = std::current_exception();
      failed = true;
    }
    if (failed) {
      switch_context(&machine.current_->context, &machine.main_);
    } else {
      machine.yield();
    }
  }
}

inline void Machine::prepare_fibers() {
  while (fibers_.size() < num_threads_) {
    const unsigned i = unsigned(fibers_.size());
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    fiber.thread = i;
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    prepare(&fiber.context, stacks_.bottom(i), stacks_.size(i), &Machine::fiber_main);
  }
}

// Ends at a red zone that starts right behind the last byte.
inline void Machine::prepare_shared(size_t bytes) {
  constexpr size_t align = 128;
  if (!memory_) memory_ = std::make_unique<char[]>(kMaxSharedBytes + 2 * kRedZone + align);
  const size_t past = reinterpret_cast<uintptr_t>(memory_.get() + kRedZone) % align;
  shared_ = memory_.get() + kRedZone + (align - past) % align;
  shared_bytes_ = bytes;
}

inline void Machine::run_block() {
  num_warps_ = (num_threads_ + 31) / 32;
  alive_ = num_threads_;
  blocked_ = 0;
  for (unsigned w = 0; w < num_warps_; ++w) {
    const unsigned lanes = min(num_threads_ - w * 32, 32u);
    warps_[w] = Warp{};
    warps_[w].alive = warps_[w].ready = kEveryLane >> (32 - lanes);
  }
  std::memset(shared_ - kRedZone, 0xff, shared_bytes_ + 2 * kRedZone);
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
                         void* argument, std::string kernel) {
  const std::lock_guard<std::mutex> guard(lock_);
  kernel_ = std::move(kernel);
  check_launch(grid, block, shared_bytes);
  body_ = body;
  argument_ = argument;
  gridDim = grid;
  blockDim = block;
  num_threads_ = block.x;
  state_ = seed_;
  prepare_shared(shared_bytes);
  prepare_fibers();
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  try {
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = order_ == Order::kBackward ? blocks - 1 - i : i;
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
