// The work list of tree attention: what the host writes once per step and the kernel reads from
// device memory. Plain C++, shared by the host builder (cuda_ext/core) and the kernels.
//
//   header   kHeaderInts: number of workers, and where the arrays below start (in ints)
//   indptr   [workers + 1] segments of each worker
//   segments [..] WorkSegment: a run of entries of one block
//   blocks   [..] WorkBlock: consecutive rows of the batch that share a tile of queries
//   entries  [..] WorkEntry: up to 16 consecutive slots of one page and the rows that read them
//
// A row's entries come in increasing order of position, whatever stands between them. Softmax is
// updated entry by entry, and an entry that a row does not read changes nothing of its state, so a
// row's result depends on its own pages and on the cuts alone, never on its neighbours.
#pragma once

#include <cstdint>

namespace dendrite {

constexpr int kUnit = 16;       // slots of an entry: the k of one tensor-core instruction
constexpr int kTileUnits = 4;   // entries that are loaded together

enum WorkHeader {
  kNumWorkers,
  kSegmentIndptr,
  kSegments,
  kBlocks,
  kEntries,
  kNumBlocks,
  kNumSlots,
  kRowsPerBlock,
  kHeaderInts
};

struct WorkSegment {
  int32_t block;
  int32_t entry_begin, entry_end;  // begin is a multiple of kTileUnits
  int32_t slot;                    // where the partial result goes, or -1: straight to the output
};

struct WorkBlock {
  int32_t row_begin, num_rows;
  int32_t num_slots;   // partial results of this block, 0 when it has one segment
  int32_t first_slot;  // they are consecutive, in the order in which they are merged
};

struct WorkEntry {
  int32_t slot;   // page * page_size + offset of the first slot
  int32_t pos;    // position of that slot
  uint32_t rows;  // readers inside the block: first | end << 16
  int32_t len;    // valid slots 1..16; 0 = padding
};

static_assert(sizeof(WorkSegment) == 16 && sizeof(WorkBlock) == 16 && sizeof(WorkEntry) == 16);

}  // namespace dendrite
