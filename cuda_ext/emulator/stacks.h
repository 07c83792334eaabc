// Memory for the stacks of a block's threads.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <stdexcept>

namespace dendrite::emulator {

// Stacks with an unmapped page below each. Address space only: memory is taken where it is used,
// and kept.
class Stacks {
 public:
  static constexpr size_t kBytes = size_t(1) << 18;
  static constexpr size_t kMost = 1024;

  // Lowest byte of stack `index`.
  char* bottom(size_t index) {
    if (base_ == nullptr) reserve();
    return base_ + index * kBytes + page();
  }
  // Ends are shifted against one another: at the same offset from a page, the stacks of a block
  // would fight for the same few cache lines.
  size_t size(size_t index) const { return kBytes - page() - (index % 61) * 320; }

 private:
  static size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }

  void reserve() {
    void* memory = mmap(nullptr, kBytes * kMost, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no address space for stacks");
    base_ = static_cast<char*>(memory);
    for (size_t i = 0; i < kMost; ++i) mprotect(base_ + i * kBytes, page(), PROT_NONE);
  }

  char* base_ = nullptr;
};

}  // namespace dendrite::emulator
