#include "schedule.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace dendrite {
namespace {

// q-rows a block aims for: enough to reuse a page well, few enough that their scores stay cached.
constexpr int kBlockQueries = 64;

[[noreturn]] void refuse(const std::string& text) { throw std::invalid_argument("plan: " + text); }

}  // namespace

Schedule::Schedule(const PlanArrays& plan, int page_size_, int window_, int group_)
    : page_size(page_size_), page_shift(0), window(window_), group(group_) {
  if (page_size < 1 || page_size > kChunk || (page_size & (page_size - 1)) != 0)
    throw std::invalid_argument("page_size must be a power of two from 1 to 256, got " +
                                std::to_string(page_size));
  if (window < 0) throw std::invalid_argument("window must be >= 0, got " + std::to_string(window));
  if (group < 1) throw std::invalid_argument("query heads per kv head must be >= 1");
  while ((1 << page_shift) < page_size) ++page_shift;
  rows_per_block = std::max(1, kBlockQueries / group);
  positions.assign(plan.positions, plan.positions + plan.num_rows);
  pages.assign(plan.page_indices, plan.page_indices + plan.num_page_indices);
  check(plan);
  make_blocks();
  make_runs(plan);
}

// Every row's nodes must tile 0 .. position: then each visible column has exactly one page.
void Schedule::check(const PlanArrays& plan) {
  std::vector<int32_t> covered(positions.size(), 0);
  for (int64_t n = 0; n < plan.num_nodes; ++n) {
    const int32_t begin = plan.node_row_begin[n], end = plan.node_row_end[n];
    const int32_t pos = plan.node_pos[n], len = plan.node_len[n];
    const int64_t first = plan.node_page_indptr[n], last = plan.node_page_indptr[n + 1];
    const std::string name = "node " + std::to_string(n);
    if (begin < 0 || begin > end || end > num_rows())
      refuse(name + " has rows " + std::to_string(begin) + ".." + std::to_string(end) + " of " +
             std::to_string(num_rows()));
    if (len < 0 || pos < 0 || pos % page_size != 0)
      refuse(name + " starts at " + std::to_string(pos) + " with length " + std::to_string(len));
    if (first < 0 || last > int64_t(pages.size()) || last - first != (len + page_size - 1) / page_size)
      refuse(name + " of " + std::to_string(len) + " tokens lists " + std::to_string(last - first) +
             " pages of " + std::to_string(page_size));
    if (len == 0) continue;
    for (int32_t r = begin; r < end; ++r) {
      if (covered[r] != pos)
        refuse("row " + std::to_string(r) + " is covered up to " + std::to_string(covered[r]) +
               " but " + name + " starts at " + std::to_string(pos));
      covered[r] = pos + len;
    }
  }
  for (int64_t r = 0; r < num_rows(); ++r) {
    if (positions[r] < 0 || covered[r] <= positions[r])
      refuse("row " + std::to_string(r) + " at position " + std::to_string(positions[r]) +
             " has nodes for " + std::to_string(covered[r]) + " tokens");
    work += window > 0 ? std::min(window, positions[r] + 1) : positions[r] + 1;
  }
  for (const int32_t page : pages) {
    if (page < 0) refuse("page index " + std::to_string(page));
    max_page = std::max(max_page, page);
  }
}

void Schedule::make_blocks() {
  const int64_t rows = num_rows();
  row_partial.assign(rows + 1, 0);
  int64_t cells = 0;
  for (int64_t begin = 0; begin < rows; begin += rows_per_block) {
    const int64_t end = std::min(rows, begin + rows_per_block);
    int low = first_chunk(begin), high = last_chunk(begin);
    for (int64_t r = begin; r < end; ++r) {
      low = std::min(low, first_chunk(r));
      high = std::max(high, last_chunk(r));
      row_partial[r + 1] = row_partial[r] + last_chunk(r) - first_chunk(r) + 1;
    }
    for (int chunk = low; chunk <= high; ++chunk) {
      cell_block.push_back(int32_t(block_first.size()));
      cell_chunk.push_back(chunk);
    }
    block_first.push_back(low);
    block_count.push_back(high - low + 1);
    block_cell.push_back(cells);
    cells += high - low + 1;
  }
}

// Calls visit(cell, run) for every non-empty meeting of a node, a block and a chunk, node by node.
template <class Visit>
void Schedule::visit_runs(const PlanArrays& plan, Visit&& visit) const {
  for (int64_t n = 0; n < plan.num_nodes; ++n) {
    const int32_t begin = plan.node_row_begin[n], end = plan.node_row_end[n];
    const int32_t pos = plan.node_pos[n], stop = pos + plan.node_len[n];
    if (begin == end || pos == stop) continue;
    for (int64_t b = begin / rows_per_block; b <= (end - 1) / rows_per_block; ++b) {
      const int32_t base = int32_t(b * rows_per_block);
      Run run{};
      run.row_begin = std::max(begin, base) - base;
      run.row_end = std::min<int32_t>(end, base + rows_per_block) - base;
      const int low = std::max(pos / kChunk, block_first[b]);
      const int high = std::min((stop - 1) / kChunk, block_first[b] + block_count[b] - 1);
      for (int chunk = low; chunk <= high; ++chunk) {
        const int32_t from = std::max(pos, chunk * kChunk), to = std::min(stop, (chunk + 1) * kChunk);
        run.column = from - chunk * kChunk;
        run.page_begin = plan.node_page_indptr[n] + (from - pos) / page_size;
        run.num_pages = (to - from + page_size - 1) / page_size;
        visit(block_cell[b] + chunk - block_first[b], run);
      }
    }
  }
}

void Schedule::make_runs(const PlanArrays& plan) {
  run_indptr.assign(cell_block.size() + 1, 0);
  visit_runs(plan, [&](int64_t cell, const Run&) { ++run_indptr[cell + 1]; });
  for (size_t i = 1; i < run_indptr.size(); ++i) run_indptr[i] += run_indptr[i - 1];
  runs.resize(run_indptr.back());
  std::vector<int64_t> next(run_indptr.begin(), run_indptr.end() - 1);
  visit_runs(plan, [&](int64_t cell, const Run& run) { runs[next[cell]++] = run; });
}

}  // namespace dendrite
