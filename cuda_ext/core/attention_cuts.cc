#include "attention_cuts.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <numeric>

#include "../include/dendrite/attention_work.h"

namespace dendrite {

namespace {

// In eighths of the time that a worker takes for a tile; fitted to runs on an H100.
constexpr int64_t kTileCost = 8;
constexpr int64_t kSegmentCost = 16;  // starting and ending a segment
constexpr int64_t kPartialCost = 8;   // writing a partial result instead of the output
constexpr int64_t kMergeCost = 40;    // launching the merge, and
constexpr int64_t kSlotCost = 1;      // reading each partial result in it

constexpr int64_t kMinTiles = 2;   // a piece has at least this much, if there is so much
constexpr int64_t kMaxSlots = 64;  // partial results of a block that are thought of
constexpr int64_t kPiecesAWorker = 4;
constexpr int64_t kShareTiles[] = {16, 8, 4, 2};  // of a piece of a cell, thought of

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Share i of n has the rows [rows * i / n, rows * (i + 1) / n).
int32_t share_of(int32_t row, int32_t parts, int32_t rows) {
  return parts == 1 ? 0 : ((row + 1) * parts - 1) / rows;
}

class Chooser {
 public:
  Chooser(const std::vector<AttentionRun>& runs, const std::vector<int32_t>& block_rows,
          int32_t workers)
      : runs_(runs), block_rows_(block_rows), workers_(workers), used_(block_rows.size(), false) {
    for (const AttentionRun& run : runs) used_[run.cell] = true;
    for (size_t b = 0; b < block_rows.size(); ++b)
      if (used_[b]) most_rows_ = std::max(most_rows_, block_rows[b]);
  }

  AttentionCuts choose() {
    if (most_rows_ == 0) return {1, 1};
    share_out(1);
    try_lengths();
    for (int32_t shares = 2; shares <= most_rows_; shares *= 2) {
      if (!share_out(shares)) break;
      consider(shares, longest_);
    }
    return best_;
  }

 private:
  // Sets the tiles of each piece, before cuts. Not if these are too many pieces for the workers.
  bool share_out(int32_t shares) {
    first_.assign(1, 0);
    for (size_t b = 0; b < block_rows_.size(); ++b)
      first_.push_back(first_[b] + (used_[b] ? std::min(shares, block_rows_[b]) : 0));
    if (shares > 1 && first_.back() > kPiecesAWorker * workers_) return false;
    sizes_.assign(first_.back() + 1, 0);  // of which each is so much more than the one before
    for (const AttentionRun& run : runs_) {
      const int32_t rows = block_rows_[run.cell], units = run.to - run.from;
      const int32_t parts = std::min(shares, rows), first = first_[run.cell];
      sizes_[first + share_of(run.row_begin, parts, rows)] += units;
      const int32_t last = share_of(run.row_end - 1, parts, rows);
      sizes_[first + last + 1] -= units;
    }
    sizes_.pop_back();
    // What ends with the last share of a block falls on the next block's first, where it is right.
    std::partial_sum(sizes_.begin(), sizes_.end(), sizes_.begin());
    for (int64_t& size : sizes_) size = std::max<int64_t>(1, divide_up(size, kTileUnits));
    total_ = std::accumulate(sizes_.begin(), sizes_.end(), int64_t{0});
    longest_ = *std::max_element(sizes_.begin(), sizes_.end());
    return true;
  }

  void try_lengths() {
    consider(1, longest_);
    int64_t before = longest_;
    for (int64_t slots = 2; slots <= kMaxSlots; ++slots) {
      const int64_t length = divide_up(longest_, slots);
      if (length < kMinTiles) break;
      if (length == before) continue;
      before = length;
      if (consider(1, length) > kPiecesAWorker * workers_) break;
    }
    for (const int64_t pieces : {workers_, 2 * workers_})
      if (total_ / pieces >= kMinTiles) consider(1, std::min(longest_, total_ / pieces));
  }

  // Takes these cuts if nothing better is known; the number of pieces.
  int64_t consider(int32_t shares, int64_t length) {
    int64_t whole = 0, rest = 0;
    for (const int64_t size : sizes_) {
      const int32_t pieces = int32_t(size) / int32_t(length);
      whole += pieces;
      rest += size > pieces * length;
    }
    const int64_t slots = divide_up(longest_, length), count = whole + rest;
    const int64_t extra = slots > 1 ? kMergeCost + kSlotCost * slots : 0;
    const int64_t each = kSegmentCost + (slots > 1 ? kPartialCost : 0);
    const int64_t least = std::max(divide_up(whole, workers_) * (kTileCost * length + each),
                                   divide_up(kTileCost * total_ + each * count, workers_));
    if (least + extra >= best_cost_) return count;
    const int64_t cost = extra + (count <= workers_ ? least : makespan(length, each));
    if (cost >= best_cost_) return count;
    best_cost_ = cost;
    best_ = {shares, length};
    return count;
  }

  int64_t makespan(int64_t length, int64_t each) {
    cut_.clear();
    for (int64_t size : sizes_) {
      for (; size > length; size -= length) cut_.push_back(length);
      cut_.push_back(size);
    }
    std::sort(cut_.begin(), cut_.end(), std::greater<>());
    LeastLoaded loads(static_cast<int32_t>(workers_));
    for (const int64_t size : cut_) loads.take(kTileCost * size + each);
    return loads.most();
  }

  const std::vector<AttentionRun>& runs_;
  const std::vector<int32_t>& block_rows_;
  const int64_t workers_;
  std::vector<char> used_;  // blocks that read something
  int32_t most_rows_ = 0;
  std::vector<int32_t> first_;  // piece of each block
  std::vector<int64_t> sizes_, cut_;
  int64_t total_ = 0, longest_ = 0;
  int64_t best_cost_ = std::numeric_limits<int64_t>::max();
  AttentionCuts best_{1, 1};
};

// Shares of the rows of cells.
class Sharer {
 public:
  Sharer(const std::vector<AttentionRun>& runs, const std::vector<AttentionCell>& cells,
         int32_t workers)
      : cells_(cells), workers_(workers), begin_(cells.size() + 1, 0), entries_(cells.size(), 0) {
    for (const AttentionRun& run : runs) {
      ++begin_[run.cell + 1];
      entries_[run.cell] += run.to - run.from;
    }
    std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
    std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
    runs_.resize(runs.size());
    for (const AttentionRun& run : runs) runs_[next[run.cell]++] = &run;
  }

  std::vector<int32_t> choose() {
    std::vector<int32_t> fewest, best;
    for (size_t c = 0; c < cells_.size(); ++c)
      fewest.push_back(static_cast<int32_t>(
          std::min<int64_t>(cells_[c].rows, divide_up(entries_[c], cells_[c].longest))));
    best = fewest;
    int64_t best_cost = cost(fewest), pieces = std::reduce(fewest.begin(), fewest.end(), int64_t{0});
    for (const int64_t tiles : kShareTiles) {
      const std::vector<int32_t> shares = share_out(fewest, tiles * kTileUnits);
      const int64_t count = std::reduce(shares.begin(), shares.end(), int64_t{0});
      if (count > kPiecesAWorker * workers_) break;
      if (count == pieces) continue;
      pieces = count;
      const int64_t now = cost(shares);
      if (now >= best_cost) continue;
      best_cost = now;
      best = shares;
    }
    return best;
  }

 private:
  // As many shares as pieces of `entries` need, where that adds an eighth to what is read at most.
  std::vector<int32_t> share_out(const std::vector<int32_t>& fewest, int64_t entries) const {
    std::vector<int32_t> shares = fewest;
    for (size_t c = 0; c < cells_.size(); ++c) {
      const auto more = static_cast<int32_t>(
          std::min<int64_t>(cells_[c].rows, divide_up(entries_[c], entries)));
      if (more > fewest[c] && 8 * read(c, more) <= 9 * read(c, fewest[c])) shares[c] = more;
    }
    return shares;
  }

  // Entries that all shares of a cell read.
  int64_t read(size_t cell, int32_t shares) const {
    const int32_t rows = cells_[cell].rows;
    int64_t total = 0;
    for (int64_t i = begin_[cell]; i < begin_[cell + 1]; ++i)
      total += int64_t{runs_[i]->to - runs_[i]->from} *
               (share_of(runs_[i]->row_end - 1, shares, rows) -
                share_of(runs_[i]->row_begin, shares, rows) + 1);
    return total;
  }

  // What the busiest worker does, if shares of a cell are alike.
  int64_t cost(const std::vector<int32_t>& shares) {
    costs_.clear();
    for (size_t c = 0; c < cells_.size(); ++c) {
      if (shares[c] == 0) continue;
      const int64_t tiles = divide_up(read(c, shares[c]), shares[c] * kTileUnits);
      costs_.insert(costs_.end(), shares[c], kTileCost * tiles + kSegmentCost + kPartialCost);
    }
    std::sort(costs_.begin(), costs_.end(), std::greater<>());
    LeastLoaded loads(static_cast<int32_t>(workers_));
    for (const int64_t cost : costs_) loads.take(cost);
    return loads.most();
  }

  const std::vector<AttentionCell>& cells_;
  const int64_t workers_;
  std::vector<int64_t> begin_, entries_;  // of each cell
  std::vector<const AttentionRun*> runs_;  // by cell
  std::vector<int64_t> costs_;
};

}  // namespace

int32_t chunk_shift(int32_t position) {
  return position < 8192 ? 9 : std::bit_width(uint32_t(position)) - 4;
}

int32_t chunk_of(int32_t position) {
  const int32_t shift = chunk_shift(position);
  return 8 * (shift - 9) + (position >> shift);
}

int32_t chunk_end(int32_t position) {
  const int32_t shift = chunk_shift(position);
  return ((position >> shift) + 1) << shift;
}

LeastLoaded::LeastLoaded(int32_t workers) : workers_(workers), heap_(workers) {
  std::iota(heap_.begin(), heap_.end(), int64_t{0});
}

int32_t LeastLoaded::take(int64_t cost) {
  const auto worker = static_cast<int32_t>(heap_[0] % workers_);
  const int64_t key = heap_[0] + cost * workers_;
  most_ = std::max(most_, key);
  size_t at = 0;
  for (size_t child = 1; child < heap_.size(); child = 2 * at + 1) {
    if (child + 1 < heap_.size() && heap_[child + 1] < heap_[child]) ++child;
    if (heap_[child] >= key) break;
    heap_[at] = heap_[child];
    at = child;
  }
  heap_[at] = key;
  return worker;
}

AttentionCuts choose_cuts(const std::vector<AttentionRun>& runs,
                          const std::vector<int32_t>& block_rows, int32_t workers) {
  return Chooser(runs, block_rows, workers).choose();
}

std::vector<int32_t> choose_shares(const std::vector<AttentionRun>& runs,
                                   const std::vector<AttentionCell>& cells, int32_t workers) {
  return Sharer(runs, cells, workers).choose();
}

}  // namespace dendrite
