#include "attention_work.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <numeric>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "../include/dendrite/attention_work.h"
#include "errors.h"

namespace dendrite {

namespace {

constexpr int32_t kSegmentCost = 2;  // tiles that starting and ending a segment is worth
constexpr int32_t kMinTiles = 2;     // a worker gets at least this much, if there is so much

// Cuts of the deterministic mode: every 256 positions up to 4096, then 8 for each doubling.
int32_t chunk_shift(int32_t position) {
  return position < 4096 ? 8 : std::bit_width(uint32_t(position)) - 4;
}

int32_t chunk_of(int32_t position) {
  const int32_t shift = chunk_shift(position);
  return (position < 4096 ? 0 : 8 * (shift - 8)) + (position >> shift);
}

int32_t chunk_end(int32_t position) {
  const int32_t shift = chunk_shift(position);
  return ((position >> shift) + 1) << shift;
}

// Units [from, to) of a node, read by rows [row_begin, row_end) of one block.
struct Run {
  int32_t cell, node, from, to;
  int32_t row_begin, row_end;  // inside the block; inside the piece, once it is placed
  int32_t old;                 // units of the node before the first with a token of this step
};

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
        rows_per_block_(rows_of_block(cut.q_tile, cut.group)),
        num_blocks_(work_blocks(cut.rows, rows_per_block_)) {}

  void collect() {
    first_chunk_.assign(num_blocks_, 0x7fffffff);
    last_chunk_.assign(num_blocks_, -1);
    for (int64_t n = 0; n < plan_.num_nodes; ++n) check_node(n);
    for (int64_t n = 0; n < plan_.num_nodes; ++n) visit_node(static_cast<int32_t>(n));
    place_cells();
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
        pos % cut_.page_size == 0 && first >= 0 && last <= plan_.num_page_indices &&
        last - first == (len + cut_.page_size - 1) / cut_.page_size)
      return;
    throw InvalidArgumentError(
        "plan: node " + std::to_string(n) + " has rows " + std::to_string(begin) + ".." +
        std::to_string(end) + " of " + std::to_string(plan_.num_rows) + ", position " +
        std::to_string(pos) + ", " + std::to_string(len) + " tokens and " +
        std::to_string(last - first) + " pages of " + std::to_string(cut_.page_size));
  }

  void visit_node(int32_t n) {
    const int32_t begin = plan_.node_row_begin[n], end = plan_.node_row_end[n];
    if (begin == end || plan_.node_len[n] == 0) return;
    const int32_t old = old_units(n);
    for (int32_t b = begin / rows_per_block_; b <= (end - 1) / rows_per_block_; ++b) {
      const int32_t base = b * rows_per_block_;
      visit_block(n, b, std::max(begin, base), std::min(end, base + rows_per_block_), old);
    }
  }

  // A row's own token is in the node that covers its position, among those that it reads.
  int32_t old_units(int32_t n) const {
    const int32_t pos = plan_.node_pos[n], len = plan_.node_len[n];
    int32_t first = len + unit_;
    for (int32_t r = plan_.node_row_begin[n]; r < plan_.node_row_end[n]; ++r) {
      const int32_t at = plan_.positions[r] - pos;
      if (at >= 0 && at < len) first = std::min(first, at);
    }
    return first / unit_;
  }

  // What the rows [begin, end) of block b can see of node n.
  void visit_block(int32_t n, int32_t b, int32_t begin, int32_t end, int32_t old) {
    const auto [low, high] = std::minmax_element(plan_.positions + begin, plan_.positions + end);
    const int32_t pos = plan_.node_pos[n], stop = pos + plan_.node_len[n];
    int32_t from = cut_.window > 0 ? std::max(pos, *low - cut_.window + 1) : pos;
    const int32_t to = std::min(stop, *high + 1);
    from -= (from - pos) % unit_;
    const int32_t base = b * rows_per_block_;
    while (from < to) {
      const int32_t chunk = cut_.deterministic ? chunk_of(from) : 0;
      const int32_t cut = cut_.deterministic ? std::min(to, chunk_end(from)) : to;
      runs_.push_back({chunk, n, (from - pos) / unit_, (cut - pos + unit_ - 1) / unit_,
                       begin - base, end - base, old});
      run_block_.push_back(b);
      first_chunk_[b] = std::min(first_chunk_[b], chunk);
      last_chunk_[b] = std::max(last_chunk_[b], chunk);
      from = cut;
    }
  }

  // A cell is what a block reads of one chunk. Cells become pieces; those whose entries are mostly of
  // single rows, several pieces with a part of the rows each.
  void place_cells() {
    std::vector<int64_t> cell_indptr(num_blocks_ + 1, 0);
    for (int64_t b = 0; b < num_blocks_; ++b)
      cell_indptr[b + 1] = cell_indptr[b] + std::max(0, last_chunk_[b] - first_chunk_[b] + 1);
    std::vector<int64_t> entries(cell_indptr[num_blocks_], 0), longest(entries.size(), 0);
    for (size_t i = 0; i < runs_.size(); ++i) {
      const int32_t b = run_block_[i];
      Run& run = runs_[i];
      run.cell += static_cast<int32_t>(cell_indptr[b]) - first_chunk_[b];
      entries[run.cell] += run.to - run.from;
      const int32_t position = plan_.node_pos[run.node] + run.from * unit_;
      longest[run.cell] = (int64_t{1} << chunk_shift(position)) / unit_;
    }
    std::vector<int64_t> piece_indptr(1, 0);
    for (int64_t b = 0; b < num_blocks_; ++b) {
      const int32_t rows = static_cast<int32_t>(std::clamp<int64_t>(
          plan_.num_rows - b * rows_per_block_, 0, rows_per_block_));
      int32_t part = 0;
      for (int64_t c = cell_indptr[b]; c < cell_indptr[b + 1]; ++c) {
        const int64_t shares =
            cut_.deterministic && entries[c] > 0
                ? std::min<int64_t>(rows, (entries[c] + longest[c] - 1) / longest[c])
                : int64_t{entries[c] > 0};
        for (int64_t i = 0; i < shares; ++i)
          pieces_.push_back({static_cast<int32_t>(b), part, static_cast<int32_t>(rows * i / shares),
                             static_cast<int32_t>(rows * (i + 1) / shares), 0, 0});
        part += shares > 0;
        piece_indptr.push_back(static_cast<int64_t>(pieces_.size()));
      }
    }
    place_runs(piece_indptr);
  }

  // Gives every piece its share of the runs; its entries start at a whole tile.
  void place_runs(const std::vector<int64_t>& piece_indptr) {
    std::vector<Run> placed;
    placed.reserve(runs_.size());
    for (const Run& run : runs_) {
      for (int64_t i = piece_indptr[run.cell]; i < piece_indptr[run.cell + 1]; ++i) {
        Piece& piece = pieces_[i];
        const int32_t begin = std::max(run.row_begin, piece.row_begin);
        const int32_t end = std::min(run.row_end, piece.row_end);
        if (begin >= end) continue;
        placed.push_back({static_cast<int32_t>(i), run.node, run.from, run.to,
                          begin - piece.row_begin, end - piece.row_begin, run.old});
        piece.count += run.to - run.from;
      }
    }
    runs_ = std::move(placed);
    for (Piece& piece : pieces_) {
      // Rows that read nothing of a chunk still have a partial result of it, an empty one: padding
      // makes the kernel write it.
      piece.count = std::max<int64_t>(piece.count, 1);
      piece.begin = num_entries_;
      piece_begin_.push_back(num_entries_);
      num_entries_ += round_up(piece.count, kTileUnits);
    }
  }

  static int64_t tiles(int64_t entries) { return (entries + kTileUnits - 1) / kTileUnits; }

  void make_segments() {
    segments_.assign(cut_.workers, WorkSegment{0, 0, -1, 0, 0, -1, 0, 0});
    last_of_.assign(cut_.workers, -1);
    for (int64_t b = 0; b < num_blocks_; ++b) {
      blocks_.push_back({static_cast<int32_t>(b * rows_per_block_), 0, 0, 0});
      blocks_[b].num_rows = static_cast<int32_t>(std::clamp<int64_t>(
          plan_.num_rows - blocks_[b].row_begin, 0, rows_per_block_));
    }
    if (!cut_.deterministic) cut_pieces();
    deal();
  }

  // Cuts every block's list at multiples of one length. Blocks that begin with the same pages are
  // cut at the same places, so their workers read the same pages at the same time.
  void cut_pieces() {
    const int64_t length = kTileUnits * piece_tiles();
    std::vector<Piece> cut;
    for (const Piece& piece : pieces_)
      for (int64_t at = 0, part = 0; at < piece.count; at += length, ++part)
        cut.push_back({piece.block, static_cast<int32_t>(part), piece.row_begin, piece.row_end,
                       piece.begin + at, std::min(length, piece.count - at)});
    pieces_ = std::move(cut);
  }

  // The shortest pieces of which every worker gets at most one, but not so many that merging them
  // takes longer; with more blocks than workers, about two pieces a worker.
  int64_t piece_tiles() const {
    int64_t total = 0, low = kMinTiles, high = kMinTiles;
    for (const Piece& piece : pieces_) {
      total += tiles(piece.count);
      high = std::max(high, tiles(piece.count));
    }
    // Merging takes about as long for 8 partial results as a worker for one tile: t / c + c / 8 is
    // least at c * c = t / 8.
    while ((low + 1) * (low + 1) * 8 <= high) ++low;
    if (int64_t(pieces_.size()) > cut_.workers)
      return std::max<int64_t>(kMinTiles, (total / cut_.workers + 1) / 2);
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      int64_t count = 0;
      for (const Piece& piece : pieces_) count += (tiles(piece.count) + middle - 1) / middle;
      if (count <= cut_.workers)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  // The largest piece first, each to the worker with the least to do.
  void deal() {
    place_slots();
    std::vector<int32_t> order(pieces_.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return pieces_[a].count > pieces_[b].count;
    });
    std::priority_queue<std::pair<int64_t, int32_t>, std::vector<std::pair<int64_t, int32_t>>,
                        std::greater<>>
        least;
    for (int32_t w = 0; w < cut_.workers; ++w) least.push({0, w});
    for (const int32_t i : order) {
      auto [load, worker] = least.top();
      least.pop();
      add_segment(worker, pieces_[i]);
      least.push({load + tiles(pieces_[i].count) + kSegmentCost, worker});
    }
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

  void write_entries(WorkEntry* out) const {
    std::fill(out, out + num_entries_, WorkEntry{0, 0, 0, 0});
    std::vector<int64_t> next = piece_begin_;
    const int32_t units_per_page = cut_.page_size / unit_;
    for (const Run& run : runs_) {
      const int32_t* pages = plan_.page_indices + plan_.node_page_indptr[run.node];
      const int32_t pos = plan_.node_pos[run.node], len = plan_.node_len[run.node];
      const uint32_t rows = uint32_t(run.row_begin) | uint32_t(run.row_end) << 16;
      WorkEntry* to = out + next[run.cell];
      for (int32_t u = run.from; u < run.to; ++u, ++to) {
        const int32_t page = pages[u / units_per_page];
        *to = {page * cut_.page_size + u % units_per_page * unit_, pos + u * unit_,
               rows | (u < run.old ? kOld : 0), std::min(unit_, len - u * unit_)};
      }
      next[run.cell] += run.to - run.from;
    }
  }

  const AttentionPlan& plan_;
  const AttentionCut& cut_;
  const int32_t unit_, rows_per_block_;
  const int64_t num_blocks_;
  std::vector<Run> runs_;  // in node order; `cell` holds the chunk until place_cells()
  std::vector<int32_t> run_block_, first_chunk_, last_chunk_;
  std::vector<int64_t> piece_begin_;  // where the entries of each piece begin, before cuts
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
