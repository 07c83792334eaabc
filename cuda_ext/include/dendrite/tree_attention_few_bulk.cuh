// The ring of tree_attention_few.cuh on Hopper: a lane asks for cells by bulk copies. Not in the
// emulator.
#pragma once

#include "tma.cuh"
#include "tree_attention_few_ring.cuh"

namespace dendrite {

class BulkCells {
 public:
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  static constexpr bool kHere = true;
#else
  static constexpr bool kHere = false;
#endif
  static constexpr int blocks(int dim, int tiles) { return 2 + (dim == 64) + (tiles == 1); }
  static DENDRITE_DEVICE void stop() { __trap(); }  // better no result than a wrong one

  DENDRITE_DEVICE BulkCells(char* ring, int cell_bytes, int pairs)
      : ring_(ring), cell_bytes_(cell_bytes) {
    if (is_first())
      for (int i = 0; i < pairs; ++i) mbarrier_init(barrier(i), 1);
    mbarrier_init_done();
    sync_warp();
  }

  DENDRITE_DEVICE char* at(int place) const { return ring_ + place * few_stride(cell_bytes_); }

  DENDRITE_DEVICE void load(int place, const int32_t* entries, const char* first, const char* second,
                            bool wanted) const {
    if (!wanted || !is_first()) return;
    const SharedAddress to = shared_address(at(place)), full = to + kPairBytes;
    mbarrier_arrive_and_expect(full, kPairBytes + 2 * cell_bytes_);
    load_bytes(to, entries, kPairBytes, full);
    load_bytes(to + kCellsAt, first, cell_bytes_, full);
    load_bytes(to + kCellsAt + cell_bytes_, second, cell_bytes_, full);
  }

  DENDRITE_DEVICE void wait(int place, int parity) const { mbarrier_wait(barrier(place), parity); }

 private:
  static DENDRITE_DEVICE bool is_first() { return threadIdx.x % kWarpSize == 0; }
  DENDRITE_DEVICE SharedAddress barrier(int place) const {
    return shared_address(at(place)) + kPairBytes;
  }

  char* const ring_;
  const int cell_bytes_;
};

}  // namespace dendrite
