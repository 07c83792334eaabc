// The rings of tree_attention_few.cuh: places in shared memory where a warp's entries and their cells
// arrive.
#pragma once

#include "attention_work.h"
#include "device.cuh"

namespace dendrite {

constexpr int kFewWarps = 4;  // of a block
constexpr int kManyPairs = 3, kLeastPairs = 2;  // of a ring: the first number that leaves room
constexpr int kFewBytes = 56 * 1024;            // of a block's rings for others beside it

// A place of a ring: two entries, 16 bytes for a barrier, their cells.
constexpr int kPairBytes = 2 * int(sizeof(WorkEntry)), kCellsAt = kPairBytes + 16;
DENDRITE_HOST_DEVICE int few_stride(int cell_bytes) { return 2 * cell_bytes + kCellsAt; }

// A warp's ring, whose lanes copy together.
class CopiedCells {
 public:
  // Of a multiprocessor, if their rings fit: what registers allow.
  static constexpr int blocks(int dim, int tiles) { return dim == 64 || tiles == 1 ? 3 : 2; }
  static constexpr bool kHere = true;  // built for this architecture

  DENDRITE_DEVICE CopiedCells(char* ring, int cell_bytes, int pairs)
      : ring_(ring), cell_bytes_(cell_bytes), pairs_(pairs) {}

  DENDRITE_DEVICE char* at(int place) const { return ring_ + place * few_stride(cell_bytes_); }

  // Asks for two entries and their cells, or for nothing: every call counts in wait().
  DENDRITE_DEVICE void load(int place, const int32_t* entries, const char* first, const char* second,
                            bool wanted) const {
    if (wanted) {
      const int lane = threadIdx.x % kWarpSize;
      char* to = at(place);
      if (lane >= kWarpSize - 2) {
        const int i = lane - (kWarpSize - 2);
        cp_async_16(to + i * sizeof(WorkEntry), entries + 4 * i, 16);
      }
      for (int part = 16 * lane; part < cell_bytes_; part += 16 * kWarpSize) {
        cp_async_16(to + kCellsAt + part, first + part, 16);
        cp_async_16(to + kCellsAt + cell_bytes_ + part, second + part, 16);
      }
    }
    cp_async_commit();
  }

  // For what was asked for as many calls ago as there are places.
  DENDRITE_DEVICE void wait(int, int) const {
    if (pairs_ == kManyPairs)
      cp_async_wait<kManyPairs - 1>();
    else
      cp_async_wait<kLeastPairs - 1>();
    sync_warp();
  }

 private:
  char* const ring_;
  const int cell_bytes_, pairs_;
};

}  // namespace dendrite
