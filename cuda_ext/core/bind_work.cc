// attention_work, attention_reads: functions of arrays, so that plans of either core and of tests can be given.
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "arrays.h"
#include "attention_work.h"
#include "bind_work.h"
#include "docs.h"
#include "errors.h"

namespace dendrite {

namespace {

using nb::literals::operator""_a;
using OutArray = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void same_size(const char* name, size_t size, const char* as, size_t wanted) {
  if (size == wanted) return;
  throw InvalidArgumentError(std::string(name) + " has " + std::to_string(size) + " entries, " + as +
                             " asks for " + std::to_string(wanted));
}

std::tuple<int64_t, int64_t, int64_t> attention_work(
    nb::handle positions, nb::handle node_pos, nb::handle node_len, nb::handle node_row_begin,
    nb::handle node_row_end, nb::handle node_page_indptr, nb::handle page_indices,
    int32_t rows_of_batch, int32_t page_size, int32_t group, int32_t q_tile, int32_t workers, int32_t window,
    bool deterministic, const OutArray& out) {
  const ArrayArg<int32_t> rows(positions, "positions"), pos(node_pos, "node_pos"),
      len(node_len, "node_len"), begin(node_row_begin, "node_row_begin"),
      end(node_row_end, "node_row_end"), indptr(node_page_indptr, "node_page_indptr"),
      pages(page_indices, "page_indices");
  same_size("node_len", len.size(), "node_pos", pos.size());
  same_size("node_row_begin", begin.size(), "node_pos", pos.size());
  same_size("node_row_end", end.size(), "node_pos", pos.size());
  same_size("node_page_indptr", indptr.size(), "node_pos", pos.size() + 1);
  const AttentionPlan plan{rows.data(), int64_t(rows.size()), pos.data(),   len.data(),
                           begin.data(), end.data(),          indptr.data(), int64_t(pos.size()),
                           pages.data(), int64_t(pages.size())};
  const AttentionCut cut{rows_of_batch, page_size, group, q_tile, workers, window, deterministic};
  AttentionWorkSize size{};
  {
    nb::gil_scoped_release unlocked;
    size = build_attention_work(plan, cut, out.data(), int64_t(out.size()));
  }
  return {size.ints, size.slots, size.blocks};
}

int64_t attention_reads(nb::handle node_row_begin, nb::handle node_row_end,
                        nb::handle node_page_indptr, int32_t rows_per_block) {
  const ArrayArg<int32_t> begin(node_row_begin, "node_row_begin"),
      end(node_row_end, "node_row_end"), indptr(node_page_indptr, "node_page_indptr");
  same_size("node_row_end", end.size(), "node_row_begin", begin.size());
  same_size("node_page_indptr", indptr.size(), "node_row_begin", begin.size() + 1);
  if (rows_per_block < 1)
    throw InvalidArgumentError("rows_per_block must be at least 1, got " +
                               std::to_string(rows_per_block));
  int64_t reads = 0;
  for (size_t n = 0; n < begin.size(); ++n) {
    const int32_t first = begin.data()[n], last = end.data()[n] - 1;
    if (first < 0 || last < first) continue;
    const int64_t blocks = last / rows_per_block - first / rows_per_block + 1;
    reads += blocks * (int64_t{indptr.data()[n + 1]} - indptr.data()[n]);
  }
  return reads;
}

}  // namespace

void bind_attention_work(nb::module_& m) {
  m.def("attention_work", &attention_work, "positions"_a, "node_pos"_a, "node_len"_a,
        "node_row_begin"_a, "node_row_end"_a, "node_page_indptr"_a, "page_indices"_a,
        "rows"_a, "page_size"_a, "group"_a, "q_tile"_a, "workers"_a, "window"_a, "deterministic"_a, "out"_a,
        docs::kAttentionWork);
  m.def("attention_reads", &attention_reads, "node_row_begin"_a, "node_row_end"_a,
        "node_page_indptr"_a, "rows_per_block"_a, docs::kAttentionReads);
}

}  // namespace dendrite
