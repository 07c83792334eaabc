// The work list of tree attention: what the host writes once per step and the kernels read from
// device memory. Plain C++, shared by the host builder (cuda_ext/core) and the kernels.
//
//   header   kWorkHeader ints: slots, segments and entries in use
//   blocks   WorkBlock [ceil(rows / rows_per_block)]: consecutive rows that share a tile of queries
//   segments WorkSegment [..]: a run of entries of one block; the first `workers` ones are where the
//            workers begin, more are reached through `next`
//   entries  WorkEntry [..]: up to 16 consecutive slots of one page and the rows that read them
//
// Everything a kernel needs first is at an offset that its arguments tell, so that few loads wait
// for each other.
//
// A row's entries come in increasing order of position, whatever stands between them. Softmax is
// updated entry by entry, and an entry that a row does not read changes nothing of its state, so a
// row's result depends on its own pages and on the cuts alone, never on its neighbours.
#pragma once

#include <cstdint>

namespace dendrite {

constexpr int kUnit = 16;       // slots of an entry: the k of one tensor-core instruction
constexpr int kTileUnits = 4;   // entries that are loaded together
constexpr int kWorkHeader = 4;

struct WorkBlock {
  int32_t row_begin, num_rows;
  int32_t num_slots;   // partial results of this block, 0 when it has one segment
  int32_t first_slot;  // they are consecutive, in the order in which they are merged
};

struct WorkSegment {
  int32_t entries;  // where they start, in ints from the start of the list; a multiple of 4
  int32_t count;    // entries; 0: the worker has nothing to do
  int32_t slot;     // where the partial result goes, or -1: straight to the output
  int32_t row_begin, num_rows;  // the block's, or some of them
  int32_t next;                 // the worker's next segment, or -1
  int32_t first_query;          // of these rows in the block's partial results
  int32_t unused;
};

struct WorkEntry {
  int32_t slot;   // page * page_size + offset of the first slot
  int32_t pos;    // position of that slot
  uint32_t rows;  // readers inside the block: first | end << 16, and kOld
  int32_t len;    // valid slots 1..16; 0 = padding
};

// In WorkEntry::rows: no token of this step is among its slots, so that they may be read while the
// kernel that stores the step's keys and values is still running.
constexpr uint32_t kOld = 1u << 15;

static_assert(sizeof(WorkSegment) == 32 && sizeof(WorkBlock) == 16 && sizeof(WorkEntry) == 16);

constexpr int rows_of_block(int q_tile, int group) { return q_tile / group > 1 ? q_tile / group : 1; }

constexpr int64_t work_blocks(int64_t rows, int rows_per_block) {
  return (rows + rows_per_block - 1) / rows_per_block;
}

constexpr int64_t segments_offset(int64_t rows, int rows_per_block) {
  return kWorkHeader + 4 * work_blocks(rows, rows_per_block);
}

}  // namespace dendrite
