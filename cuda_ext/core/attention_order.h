// The order of a piece's entries. Half of a tile of 128 queries is one warpgroup's. It skips tiles
// that only the other one's rows read, so these alternate and both have something to do.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../include/dendrite/attention_work.h"

namespace dendrite {

// Places of the entries of one piece: first those that rows of both halves read, then whole tiles
// of either half in turn. Entries of each of the three kinds keep their order.
class AttentionOrder {
 public:
  enum Kind { kBoth, kFirst, kSecond };

  static Kind kind(int32_t row_begin, int32_t row_end, int32_t half_rows) {
    if (half_rows == 0) return kBoth;
    return row_end <= half_rows ? kFirst : row_begin >= half_rows ? kSecond : kBoth;
  }

  // Counts units of a run; runs come in their order in the plan.
  void add(int32_t row_begin, int32_t row_end, int32_t half_rows, int64_t units) {
    const Kind is = kind(row_begin, row_end, half_rows);
    count_[is] += units;
    if (is == kFirst) first_end_ = std::max(first_end_, row_end);
    if (is == kSecond) second_begin_ = std::min(second_begin_, row_begin);
    // A node of a tree has no ancestor with fewer rows. If this plan is of another kind, a row could
    // meet the entries of this run too early.
    if (is == kBoth && (row_begin < first_end_ || row_end > second_begin_)) in_turn_ = false;
  }

  // After the last add().
  void close() {
    const int64_t to_fill = -count_[kBoth] & (kTileUnits - 1);
    in_turn_ = in_turn_ && count_[kFirst] > 0 && count_[kSecond] > 0;
    fill_ = std::min(to_fill, count_[kFirst]);
    const int64_t first = count_[kFirst] - fill_, second = count_[kSecond];
    turns_ = std::min(first, second) & -int64_t{kTileUnits};
    const bool first_is_longer = first > second;
    longer_ = first_is_longer ? kFirst : kSecond;
    shorter_rest_ = std::min(first, second) - turns_;
    longer_whole_ = (std::max(first, second) - turns_) & -int64_t{kTileUnits};
    next_[0] = next_[1] = next_[2] = 0;
  }

  int64_t count() const { return count_[kBoth] + count_[kFirst] + count_[kSecond]; }

  struct Place {
    int64_t at, room;  // in the piece, and how many of the run's units fit there
  };

  // Of the next unit of a run; `take` says how many were put there.
  Place next(Kind kind) const {
    if (!in_turn_) return {next_[kBoth], kMany};
    int64_t index = next_[kind];
    if (kind == kBoth) return {index, kMany};
    if (kind == kFirst && index < fill_) return {count_[kBoth] + index, fill_ - index};
    if (kind == kFirst) index -= fill_;
    const int64_t begin = count_[kBoth] + fill_;
    if (index < turns_) {
      const int64_t inside = index & (kTileUnits - 1), tile = index - inside;
      return {begin + 2 * tile + (kind == kFirst ? kTileUnits : 0) + inside, kTileUnits - inside};
    }
    const int64_t tail = begin + 2 * turns_;
    index -= turns_;
    if (kind != longer_) return {tail + longer_whole_ + index, kMany};
    if (index < longer_whole_) return {tail + index, longer_whole_ - index};
    return {tail + index + shorter_rest_, kMany};
  }

  void take(Kind kind, int64_t units) { next_[in_turn_ ? kind : kBoth] += units; }

 private:
  static constexpr int64_t kMany = int64_t{1} << 40;

  int64_t count_[3] = {}, next_[3] = {};
  int64_t fill_ = 0, turns_ = 0, shorter_rest_ = 0, longer_whole_ = 0;
  int32_t first_end_ = 0, second_begin_ = 0x7fffffff;
  Kind longer_ = kFirst;
  bool in_turn_ = true;
};

}  // namespace dendrite
