// What the emulator says when a kernel is wrong. Included by block.h.
#pragma once

#include <sstream>

namespace dendrite::emulator {

inline std::string Machine::where(bool with_thread) const {
  std::ostringstream out;
  out << kernel_ << ": block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ")";
  if (with_thread && current_ != nullptr)
    out << ", thread " << current_->thread << " (warp " << current_->warp << ", lane "
        << current_->lane << ")";
  return out.str();
}

inline void Machine::fail(const std::string& what) const {
  throw std::runtime_error(where(true) + ": " + what);
}

inline void Machine::fail_incomplete(Wait wait) const {
  std::ostringstream out;
  out << name_of(wait) << " needs 32 lanes, but only those in mask 0x" << std::hex
      << warps_[current_->warp].alive << " are there: the others returned or the block is cut short";
  fail(out.str());
}

inline void Machine::fail_mixed(Wait wait) const {
  const Warp& warp = warps_[current_->warp];
  std::ostringstream out;
  out << "calls " << name_of(wait) << " while lanes of mask 0x" << std::hex << warp.arrived
      << " of its warp wait in " << name_of(warp.wait);
  if (warp.wait == wait) out << " with values of another size";
  fail(out.str());
}

inline void Machine::fail_deadlock() const {
  std::ostringstream out;
  out << where(false) << ": deadlock, no thread can go on:";
  for (unsigned i = 0; i < num_threads_;) {
    const Warp& warp = warps_[i / 32];
    const auto state = [&](unsigned t) {
      return (warps_[t / 32].alive >> (t % 32) & 1) ? int(fibers_[t]->wait) : -1;
    };
    (void)warp;
    unsigned end = i + 1;
    while (end < num_threads_ && state(end) == state(i)) ++end;
    out << (i == 0 ? " " : "; ") << "threads " << i << " to " << end - 1
        << (state(i) < 0 ? " returned" : std::string(" wait in ") + name_of(Wait(state(i))));
    i = end;
  }
  throw std::runtime_error(out.str());
}

}  // namespace dendrite::emulator
