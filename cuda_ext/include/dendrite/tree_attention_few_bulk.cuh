// The ring of tree_attention_few.cuh on Hopper: a lane asks for a cell in one bulk copy. Not in the
// emulator.
#pragma once

#include "tma.cuh"
#include "tree_attention_few.cuh"

namespace dendrite {

class BulkCells {
 public:
  static constexpr int blocks(int dim, int tiles) { return dim == 128 && tiles == 2 ? 2 : 4; }

  DENDRITE_DEVICE BulkCells(char* ring, int cell_bytes, int cells)
      : ring_(ring), cell_bytes_(cell_bytes) {
    if (is_first())
      for (int i = 0; i < cells; ++i) mbarrier_init(barrier(i), 1);
    mbarrier_init_done();
    sync_warp();
  }

  DENDRITE_DEVICE char* at(int place) const { return ring_ + place * few_stride(cell_bytes_); }

  DENDRITE_DEVICE void load(int place, const int32_t* entry, const char* cell, bool wanted) const {
    if (!wanted || !is_first()) return;
    const SharedAddress to = shared_address(at(place));
    mbarrier_arrive_and_expect(barrier(place), cell_bytes_ + int(sizeof(WorkEntry)));
    load_bytes(to, entry, sizeof(WorkEntry), barrier(place));
    load_bytes(to + kCellAt, cell, cell_bytes_, barrier(place));
  }

  DENDRITE_DEVICE void wait(int place, int parity) const { mbarrier_wait(barrier(place), parity); }

 private:
  static DENDRITE_DEVICE bool is_first() { return threadIdx.x % kWarpSize == 0; }
  DENDRITE_DEVICE SharedAddress barrier(int place) const {
    return shared_address(at(place)) + int(sizeof(WorkEntry));
  }

  char* const ring_;
  const int cell_bytes_;
};

}  // namespace dendrite
