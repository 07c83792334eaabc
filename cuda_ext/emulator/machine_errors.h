// What the emulator says when a kernel is wrong. Included by machine.h.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "machine.h"

namespace dendrite::emulator {

inline std::string describe(const Meeting& meeting) {
  static constexpr const char* names[] = {
      "nothing", "sync_block", "sync_warp", "shfl_xor", "shfl", "shfl_up", "shfl_down", "ballot",
      "any_sync", "all_sync", "ldmatrix_x4", "ldmatrix_x2", "ldmatrix_x4_trans",
      "ldmatrix_x2_trans", "transpose_8x8", "mma_m16n8k16<bf16>", "mma_m16n8k16<half_t>"};
  std::string text = names[int(meeting.wait)];
  if (meeting.bytes != 0) text += " of " + std::to_string(meeting.bytes) + " bytes";
  if (meeting.place.file != nullptr) {
    const std::string file = meeting.place.file;
    text +=
        " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(meeting.place.line) + ")";
  }
  return text;
}

inline std::string Machine::where() const {
  std::ostringstream out;
  out << kernel_ << ", block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ")";
  if (current_ != nullptr)
    out << ", thread " << current_->thread << " (warp " << current_->warp << ", lane "
        << current_->lane << ")";
  return out.str();
}

inline void Machine::fail(const std::string& what) const {
  throw std::runtime_error(where() + ": " + what);
}

inline void Machine::fail_incomplete(const Meeting& meeting) const {
  std::ostringstream out;
  out << describe(meeting) << " needs all 32 lanes, but the warp has only those of mask 0x"
      << std::hex << warps_[current_->warp].alive << ": the others returned or never were";
  fail(out.str());
}

inline void Machine::fail_mixed(const Meeting& mine, const Meeting& others) const {
  fail("calls " + describe(mine) + " while others of its " +
       (mine.wait == Wait::kSyncBlock ? "block" : "warp") + " wait in " + describe(others));
}

// Groups of neighbouring threads that wait for the same thing.
inline void Machine::fail_deadlock() const {
  const auto state = [&](unsigned thread) {
    const bool alive = warps_[thread / 32].alive >> (thread % 32) & 1;
    return alive ? "wait in " + describe(fibers_[thread]->meeting) : std::string("returned");
  };
  std::string text = "deadlock, no thread can go on:";
  for (unsigned i = 0; i < num_threads_;) {
    const std::string now = state(i);
    unsigned end = i + 1;
    while (end < num_threads_ && state(end) == now) ++end;
    text += (i == 0 ? " threads " : "; threads ") + std::to_string(i) + " to " +
            std::to_string(end - 1) + " " + now;
    i = end;
  }
  fail(text);
}

inline void Machine::check_launch(dim3 grid, dim3 block, size_t shared_bytes) const {
  const auto sizes = [](dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  if (grid.x == 0 || grid.y == 0 || grid.z == 0)
    throw std::runtime_error(kernel_ + ": a grid of " + sizes(grid) + " blocks is empty");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(kernel_ + ": a grid of " + sizes(grid) +
                             " blocks; y and z are at most 65535");
  if (block.x == 0 || block.x > kMaxThreads || block.y != 1 || block.z != 1)
    throw std::runtime_error(kernel_ + ": a block of " + sizes(block) +
                             " threads; here it is 1 to 1024 x 1 x 1");
  if (shared_bytes > kMaxSharedBytes)
    throw std::runtime_error(kernel_ + ": asks for " + std::to_string(shared_bytes) +
                             " bytes of shared memory, at most " + std::to_string(kMaxSharedBytes));
}

inline void Machine::check_red_zones() const {
  for (size_t i = 0; i < kRedZone; ++i) {
    if (shared_[-1 - ptrdiff_t(i)] != char(0xff))
      fail("wrote " + std::to_string(i + 1) + " bytes before shared memory");
    if (shared_[shared_bytes_ + i] != char(0xff))
      fail("wrote byte " + std::to_string(shared_bytes_ + i) + " of shared memory, which has " +
           std::to_string(shared_bytes_) + " bytes");
  }
}

}  // namespace dendrite::emulator
