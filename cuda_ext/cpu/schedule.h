// Which rows see which pages: the attention nodes of one plan, cut into blocks of rows and chunks of
// positions. Built once per step, used by every layer.
//
// Index algebra:
//   block b holds rows [b * rows_per_block, (b + 1) * rows_per_block)
//   row r sees chunks first_chunk(r) .. positions[r] / kChunk (first_chunk > 0 only with a window)
//   cell(b, c) = block_cell[b] + c - block_first[b]; its runs are runs[run_indptr[cell] .. +1]
//   partial(r, c) = row_partial[r] + c - first_chunk(r): where a row's chunk result is kept
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace dendrite {

// The arrays of a plan, as they come from the page table (rows in depth-first order of the tree).
struct PlanArrays {
  const int32_t* positions;  // [rows]
  int64_t num_rows;
  const int32_t* node_pos;  // [nodes] position of the first slot
  const int32_t* node_len;  // [nodes] tokens
  const int32_t* node_row_begin;
  const int32_t* node_row_end;
  const int32_t* node_page_indptr;  // [nodes + 1]
  int64_t num_nodes;
  const int32_t* page_indices;  // [page_indptr[nodes]]
  int64_t num_page_indices;
};

class Schedule {
 public:
  // Throws std::invalid_argument when the nodes of some row don't tile 0 .. its position.
  Schedule(const PlanArrays& plan, int page_size, int window, int group);

  int64_t num_rows() const { return int64_t(positions.size()); }
  int64_t num_blocks() const { return int64_t(block_first.size()); }
  int64_t num_cells() const { return int64_t(run_indptr.size()) - 1; }
  int64_t num_partials() const { return row_partial.empty() ? 0 : row_partial.back(); }
  int first_chunk(int64_t row) const {
    const int first = positions[row] - window + 1;
    return window > 0 && first > 0 ? first / kChunk : 0;
  }
  int last_chunk(int64_t row) const { return positions[row] / kChunk; }

  int page_size, page_shift, window, group, rows_per_block;
  int32_t max_page = -1;
  int64_t work = 0;  // sum over rows of visible tokens
  std::vector<int32_t> positions, pages;
  std::vector<int32_t> block_first, block_count;  // chunks of a block
  std::vector<int64_t> block_cell;
  std::vector<int32_t> cell_block, cell_chunk;
  std::vector<int64_t> run_indptr, row_partial;
  std::vector<Run> runs;

 private:
  void check(const PlanArrays& plan);
  void make_blocks();
  void make_runs(const PlanArrays& plan);
  template <class Visit>
  void visit_runs(const PlanArrays& plan, Visit&& visit) const;
};

}  // namespace dendrite
