#include "attention_work.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "../include/dendrite/attention_work.h"
#include "attention_cuts.h"
#include "attention_order.h"
#include "errors.h"

namespace dendrite {

namespace {

constexpr int32_t kSegmentTiles = 2;  // that starting and ending a segment is worth

// Entries [begin, begin + count) for rows [row_begin, row_end) of one block, read by one worker. Its
// result is the block's partial result number `part`.
struct Piece {
  int32_t block, part, row_begin, row_end;
  int64_t begin, count;
};

class Builder {
 public:
  Builder(const AttentionPlan& plan, const AttentionCut& cut)
      : plan_(plan), cut_(cut), unit_(std::min(kUnit, cut.page_size)),
        unit_shift_(std::countr_zero(uint32_t(unit_))),
        page_shift_(std::countr_zero(uint32_t(cut.page_size))),
        half_rows_(cut.q_tile == 128 ? 64 / cut.group : 0),
        rows_per_block_(rows_of_block(cut.q_tile, cut.group)),
        num_blocks_(work_blocks(cut.rows, rows_per_block_)) {}

  void collect() {
    first_chunk_.assign(num_blocks_, 0x7fffffff);
    last_chunk_.assign(num_blocks_, -1);
    block_rows_.resize(num_blocks_);
    for (int64_t b = 0; b < num_blocks_; ++b)
      block_rows_[b] = static_cast<int32_t>(
          std::clamp<int64_t>(plan_.num_rows - b * rows_per_block_, 0, rows_per_block_));
    runs_.reserve(plan_.num_nodes + 2 * num_blocks_);
    for (int64_t n = 0; n < plan_.num_nodes; ++n) check_node(n);
    for (int64_t n = 0; n < plan_.num_nodes; ++n) visit_node(static_cast<int32_t>(n));
    cut_.deterministic ? place_cells() : place_blocks();
  }

  AttentionWorkSize finish(int32_t* out, int64_t capacity) {
    make_segments();
    const int64_t segments_at = segments_offset(cut_.rows, rows_per_block_);
    const int64_t entries_at = segments_at + 8 * int64_t(segments_.size());
    const AttentionWorkSize size{entries_at + 4 * num_entries_, num_slots_, num_blocks_};
    if (size.ints > capacity) return size;
    const int32_t header[kWorkHeader] = {num_slots_, static_cast<int32_t>(segments_.size()),
                                         static_cast<int32_t>(num_entries_), 0};
    std::copy(header, header + kWorkHeader, out);
    std::copy(blocks_.begin(), blocks_.end(), reinterpret_cast<WorkBlock*>(out + kWorkHeader));
    for (WorkSegment& segment : segments_)
      segment.entries = static_cast<int32_t>(entries_at + 4 * int64_t{segment.entries});
    std::copy(segments_.begin(), segments_.end(), reinterpret_cast<WorkSegment*>(out + segments_at));
    write_entries(reinterpret_cast<WorkEntry*>(out + entries_at));
    return size;
  }

 private:
  static int64_t round_up(int64_t value, int64_t by) { return (value + by - 1) / by * by; }

  void check_node(int64_t n) const {
    const int64_t begin = plan_.node_row_begin[n], end = plan_.node_row_end[n];
    const int64_t len = plan_.node_len[n], pos = plan_.node_pos[n];
    const int64_t first = plan_.node_page_indptr[n], last = plan_.node_page_indptr[n + 1];
    if (begin >= 0 && begin <= end && end <= plan_.num_rows && len >= 0 && pos >= 0 &&
        (pos & (cut_.page_size - 1)) == 0 && first >= 0 && last <= plan_.num_page_indices &&
        last - first == (len + cut_.page_size - 1) >> page_shift_)
      return;
    throw InvalidArgumentError(
        "plan: node " + std::to_string(n) + " has rows " + std::to_string(begin) + ".." +
        std::to_string(end) + " of " + std::to_string(plan_.num_rows) + ", position " +
        std::to_string(pos) + ", " + std::to_string(len) + " tokens and " +
        std::to_string(last - first) + " pages of " + std::to_string(cut_.page_size));
  }

  void visit_node(int32_t n) {
    const int32_t begin = plan_.node_row_begin[n], end = plan_.node_row_end[n];
    const int32_t pos = plan_.node_pos[n], len = plan_.node_len[n];
    if (begin == end || len == 0) return;
    const size_t first_run = runs_.size();
    int32_t own = len + unit_ - 1;  // of the node: the first token of this step, or none
    for (int32_t b = begin / rows_per_block_, base = b * rows_per_block_; base < end;
         ++b, base += rows_per_block_) {
      const int32_t from = std::max(begin, base), to = std::min(end, base + rows_per_block_);
      int32_t low = 0x7fffffff, high = -1;
      for (int32_t r = from; r < to; ++r) {
        const int32_t position = plan_.positions[r];
        low = std::min(low, position);
        high = std::max(high, position);
        // A row's own token is in the node that covers its position, among those that it reads.
        if (position >= pos && position - pos < len) own = std::min(own, position - pos);
      }
      visit_block(n, b, {low, high}, from - base, to - base);
    }
    for (size_t i = first_run; i < runs_.size(); ++i)
      runs_[i].old = own < len ? own >> unit_shift_ : (len + unit_) >> unit_shift_;
  }

  // What rows [row_begin, row_end) of block b, between these positions, can see of node n.
  void visit_block(int32_t n, int32_t b, std::pair<int32_t, int32_t> seen, int32_t row_begin,
                   int32_t row_end) {
    const int32_t pos = plan_.node_pos[n], stop = pos + plan_.node_len[n];
    int32_t from = cut_.window > 0 ? std::max(pos, seen.first - cut_.window + 1) : pos;
    const int32_t to = std::min(stop, seen.second + 1);
    from -= (from - pos) & (unit_ - 1);
    while (from < to) {
      const int32_t chunk = cut_.deterministic ? chunk_of(from) : 0;
      const int32_t cut = cut_.deterministic ? std::min(to, chunk_end(from)) : to;
      runs_.push_back({cut_.deterministic ? chunk : b, n, (from - pos) >> unit_shift_,
                       (cut - pos + unit_ - 1) >> unit_shift_, row_begin, row_end, 0});
      if (cut_.deterministic) run_block_.push_back(b);
      first_chunk_[b] = std::min(first_chunk_[b], chunk);
      last_chunk_[b] = std::max(last_chunk_[b], chunk);
      from = cut;
    }
  }

  // Without fixed cuts: a block's rows in as many pieces as pays.
  void place_blocks() {
    cuts_ = choose_cuts(runs_, block_rows_, cut_.workers);
    std::vector<int64_t> piece_indptr(1, 0);
    piece_indptr.reserve(num_blocks_ + 1);
    for (int64_t b = 0; b < num_blocks_; ++b) {
      if (last_chunk_[b] >= 0) add_pieces(b, 0, std::min(cuts_.shares, block_rows_[b]));
      piece_indptr.push_back(static_cast<int64_t>(pieces_.size()));
    }
    place_runs(piece_indptr);
  }

  void add_pieces(int64_t block, int32_t part, int64_t shares) {
    const int64_t rows = block_rows_[block];
    for (int64_t i = 0; i < shares; ++i)
      pieces_.push_back({static_cast<int32_t>(block), part, static_cast<int32_t>(rows * i / shares),
                         static_cast<int32_t>(rows * (i + 1) / shares), 0, 0});
  }

  // A cell is what a block reads of one chunk. Cells become pieces, or several with a part of the
  // rows each.
  void place_cells() {
    std::vector<int64_t> cell_indptr(num_blocks_ + 1, 0);
    for (int64_t b = 0; b < num_blocks_; ++b)
      cell_indptr[b + 1] = cell_indptr[b] + std::max(0, last_chunk_[b] - first_chunk_[b] + 1);
    std::vector<AttentionCell> cells(cell_indptr[num_blocks_], AttentionCell{0, 1});
    for (size_t i = 0; i < runs_.size(); ++i) {
      const int32_t b = run_block_[i];
      AttentionRun& run = runs_[i];
      run.cell += static_cast<int32_t>(cell_indptr[b]) - first_chunk_[b];
      const int32_t position = plan_.node_pos[run.node] + run.from * unit_;
      cells[run.cell] = {block_rows_[b], (int64_t{1} << chunk_shift(position)) / unit_};
    }
    const std::vector<int32_t> shares = choose_shares(runs_, cells, cut_.workers);
    std::vector<int64_t> piece_indptr(1, 0);
    for (int64_t b = 0; b < num_blocks_; ++b) {
      int32_t part = 0;
      for (int64_t c = cell_indptr[b]; c < cell_indptr[b + 1]; ++c) {
        if (shares[c] > 0) add_pieces(b, part++, shares[c]);
        piece_indptr.push_back(static_cast<int64_t>(pieces_.size()));
      }
    }
    place_runs(piece_indptr);
  }

  // Gives every piece its share of the runs; its entries start at a whole tile.
  void place_runs(const std::vector<int64_t>& piece_indptr) {
    std::vector<AttentionRun> placed;
    placed.reserve(2 * runs_.size());
    orders_.resize(pieces_.size());
    for (const AttentionRun& run : runs_) {
      for (int64_t i = piece_indptr[run.cell]; i < piece_indptr[run.cell + 1]; ++i) {
        Piece& piece = pieces_[i];
        const int32_t begin = std::max(run.row_begin, piece.row_begin);
        const int32_t end = std::min(run.row_end, piece.row_end);
        if (begin >= end) continue;
        placed.push_back({static_cast<int32_t>(i), run.node, run.from, run.to,
                          begin - piece.row_begin, end - piece.row_begin, run.old});
        piece.count += run.to - run.from;
        orders_[i].add(begin - piece.row_begin, end - piece.row_begin, half_rows_,
                       run.to - run.from);
      }
    }
    runs_ = std::move(placed);
    piece_begin_.reserve(pieces_.size() + 1);
    for (size_t i = 0; i < pieces_.size(); ++i) {
      // Rows that read nothing still have a result, an empty one: padding makes the kernel write it.
      pieces_[i].count = std::max<int64_t>(pieces_[i].count, 1);
      pieces_[i].begin = num_entries_;
      piece_begin_.push_back(num_entries_);
      num_entries_ += round_up(pieces_[i].count, kTileUnits);
      orders_[i].close();
    }
    piece_begin_.push_back(num_entries_);
  }

  static int64_t tiles(int64_t entries) { return (entries + kTileUnits - 1) / kTileUnits; }

  void make_segments() {
    segments_.reserve(cut_.workers + pieces_.size());
    segments_.assign(cut_.workers, WorkSegment{0, 0, -1, 0, 0, -1, 0, 0});
    last_of_.assign(cut_.workers, -1);
    blocks_.reserve(num_blocks_);
    for (int64_t b = 0; b < num_blocks_; ++b)
      blocks_.push_back({static_cast<int32_t>(b * rows_per_block_), block_rows_[b], 0, 0});
    if (!cut_.deterministic) cut_pieces();
    deal();
  }

  // Cuts every piece at multiples of one length. Blocks that begin with the same pages are cut at
  // the same places, so their workers read the same pages at the same time.
  void cut_pieces() {
    const int64_t length = kTileUnits * cuts_.tiles;
    std::vector<Piece> cut;
    cut.reserve(pieces_.size() + 4 * cut_.workers);
    for (const Piece& piece : pieces_)
      for (int64_t at = 0, part = 0; at < piece.count; at += length, ++part)
        cut.push_back({piece.block, static_cast<int32_t>(part), piece.row_begin, piece.row_end,
                       piece.begin + at, std::min(length, piece.count - at)});
    pieces_ = std::move(cut);
  }

  // The largest piece first, each to the worker with the least to do.
  void deal() {
    place_slots();
    std::vector<std::pair<int64_t, int32_t>> order;  // by size, then as they come
    order.reserve(pieces_.size());
    for (size_t i = 0; i < pieces_.size(); ++i)
      order.push_back({-pieces_[i].count, static_cast<int32_t>(i)});
    std::sort(order.begin(), order.end());
    if (order.size() <= size_t(cut_.workers)) {
      for (size_t w = 0; w < order.size(); ++w)
        add_segment(static_cast<int32_t>(w), pieces_[order[w].second]);
      return;
    }
    LeastLoaded loads(cut_.workers);
    for (const auto& [count, i] : order)
      add_segment(loads.take(tiles(-count) + kSegmentTiles), pieces_[i]);
  }

  // Slots in block order; a block with a single part needs none.
  void place_slots() {
    for (const Piece& piece : pieces_)
      blocks_[piece.block].num_slots = std::max(blocks_[piece.block].num_slots, piece.part + 1);
    for (WorkBlock& block : blocks_) {
      if (block.num_slots == 1) block.num_slots = 0;
      block.first_slot = num_slots_;
      num_slots_ += block.num_slots;
    }
  }

  void add_segment(int32_t worker, const Piece& piece) {
    const WorkBlock& block = blocks_[piece.block];
    const WorkSegment segment{static_cast<int32_t>(piece.begin),
                              static_cast<int32_t>(piece.count),
                              block.num_slots > 0 ? block.first_slot + piece.part : -1,
                              block.row_begin + piece.row_begin,
                              piece.row_end - piece.row_begin,
                              -1,
                              piece.row_begin * cut_.group,
                              0};
    if (last_of_[worker] < 0) {
      segments_[worker] = segment;
      last_of_[worker] = worker;
      return;
    }
    segments_[last_of_[worker]].next = static_cast<int32_t>(segments_.size());
    last_of_[worker] = static_cast<int32_t>(segments_.size());
    segments_.push_back(segment);
  }

  void write_entries(WorkEntry* out) {
    for (size_t i = 0; i + 1 < piece_begin_.size(); ++i) {
      const int64_t used = orders_[i].count();
      std::fill(out + piece_begin_[i] + used, out + piece_begin_[i + 1], WorkEntry{0, 0, 0, 0});
    }
    for (const AttentionRun& run : runs_) {
      AttentionOrder& order = orders_[run.cell];
      const auto kind = AttentionOrder::kind(run.row_begin, run.row_end, half_rows_);
      for (int32_t u = run.from; u < run.to;) {
        const auto [at, room] = order.next(kind);
        const auto units = static_cast<int32_t>(std::min<int64_t>(room, run.to - u));
        write_run(run, u, u + units, out + piece_begin_[run.cell] + at);
        order.take(kind, units);
        u += units;
      }
    }
  }

  void write_run(const AttentionRun& run, int32_t from, int32_t to, WorkEntry* out) const {
    const int32_t* pages = plan_.page_indices + plan_.node_page_indptr[run.node];
    const int32_t pos = plan_.node_pos[run.node], len = plan_.node_len[run.node];
    const uint32_t rows = uint32_t(run.row_begin) | uint32_t(run.row_end) << 16;
    const int32_t shift = page_shift_ - unit_shift_, inside = (1 << shift) - 1;
    for (int32_t u = from; u < to; ++u)
      *out++ = {(pages[u >> shift] << page_shift_) + ((u & inside) << unit_shift_),
                pos + (u << unit_shift_), rows | (u < run.old ? kOld : 0),
                std::min(unit_, len - (u << unit_shift_))};
  }

  const AttentionPlan& plan_;
  const AttentionCut& cut_;
  const int32_t unit_, unit_shift_, page_shift_;
  const int32_t half_rows_;  // rows of a piece whose queries are the first warpgroup's, 0: all
  const int32_t rows_per_block_;
  const int64_t num_blocks_;
  // In node order; `cell` is the block, or with fixed cuts the chunk until place_cells().
  std::vector<AttentionRun> runs_;
  std::vector<int32_t> block_rows_, run_block_, first_chunk_, last_chunk_;
  AttentionCuts cuts_{1, 1};
  std::vector<AttentionOrder> orders_;  // of each piece, before cuts
  std::vector<int64_t> piece_begin_;    // where its entries begin; and the end of all
  int64_t num_entries_ = 0;
  std::vector<Piece> pieces_;
  std::vector<int32_t> last_of_;  // last segment of each worker so far
  std::vector<WorkSegment> segments_;
  std::vector<WorkBlock> blocks_;
  int32_t num_slots_ = 0;
};

void check_cut(const AttentionCut& cut, int64_t num_rows) {
  const auto refuse = [](const char* name, int32_t value, const char* why) {
    throw InvalidArgumentError(std::string(name) + " must be " + why + ", got " +
                               std::to_string(value));
  };
  if (cut.page_size < 1 || !std::has_single_bit(uint32_t(cut.page_size)))
    refuse("page_size", cut.page_size, "a power of two");
  if (cut.q_tile < 1 || cut.q_tile > 0x7fff) refuse("q_tile", cut.q_tile, "from 1 to 32767");
  if (cut.group < 1 || cut.group > cut.q_tile)
    refuse("group", cut.group, "from 1 to q_tile, the queries of a tile");
  if (cut.workers < 1) refuse("workers", cut.workers, "at least 1");
  if (cut.rows < num_rows)
    refuse("rows", cut.rows, "at least the rows of the plan");
  if (cut.window < 0) refuse("window", cut.window, "at least 0");
}

}  // namespace

AttentionWorkSize build_attention_work(const AttentionPlan& plan, const AttentionCut& cut,
                                       int32_t* out, int64_t capacity) {
  check_cut(cut, plan.num_rows);
  Builder builder(plan, cut);
  builder.collect();
  return builder.finish(out, capacity);
}

}  // namespace dendrite
