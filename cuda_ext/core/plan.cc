#include "plan.h"

#include <algorithm>

namespace dendrite {

namespace {

// A segment at or above an item.
struct Node {
  Segment* segment;
  int32_t parent = -1, first_child = -1, last_child = -1, next = -1;
  int32_t from = 0, to = 0;  // own item, empty when from == to
  bool refresh = false;      // the item reads K and V of its token back, it does not store them
  int32_t row_begin = 0;
  int32_t whole = -1;  // attention node with the whole pages, its row_end is set on the way up
};

class Builder {
 public:
  Builder(SegmentTree& tree, int64_t mark, PlanArrays& out) : tree_(tree), mark_(mark), out_(out) {}

  void request(Segment* tail, int32_t quota) {
    Segment* first = first_uncomputed(tail);
    Node& node = nodes_[involve(first ? first : tail)];
    if (first) {
      node.from = first->computed;
      node.to = std::max(node.to, static_cast<int32_t>(std::min<int64_t>(
                                      first->end(), int64_t{first->computed} + quota)));
    } else {
      node.refresh = true;
      node.from = tail->end() - 1;
      node.to = tail->end();
    }
  }

  // Depth-first preorder without recursion: trees may be as deep as they are long.
  void emit_all() {
    for (int32_t root = first_root_; root >= 0; root = nodes_[root].next) {
      int32_t at = root;
      for (bool down = true; at >= 0;) {
        if (down) enter(nodes_[at]);
        if (down && nodes_[at].first_child >= 0) {
          at = nodes_[at].first_child;
          continue;
        }
        leave(nodes_[at]);
        if (at == root) break;
        down = nodes_[at].next >= 0;
        at = down ? nodes_[at].next : nodes_[at].parent;
      }
    }
  }

  int32_t logits_row(const Segment* tail) const {
    if (tail->plan_mark != mark_) return -1;
    const Node& node = nodes_[tail->plan_node];
    if (node.to != tail->end()) return -1;
    return node.row_begin + (node.to - node.from) - 1;
  }

  std::vector<FlightItem> take_items() { return std::move(items_); }

 private:
  // Above a segment that has computed tokens everything is computed.
  static Segment* first_uncomputed(Segment* tail) {
    Segment* first = nullptr;
    for (Segment* s = tail; s; s = s->parent) {
      if (s->computed < s->end()) first = s;
      if (s->computed > s->start) break;
    }
    return first;
  }

  // Children are linked in the order in which the request list first reaches them.
  int32_t involve(Segment* segment) {
    const int32_t result = add(segment);
    int32_t below = result;
    for (Segment* s = segment; fresh_; s = s->parent) {
      const int32_t above = s->parent ? add(s->parent) : -1;
      if (!s->parent) fresh_ = false;
      link(above, below);
      below = above;
    }
    return result;
  }

  int32_t add(Segment* segment) {
    fresh_ = segment->plan_mark != mark_;
    if (fresh_) {
      segment->plan_mark = mark_;
      segment->plan_node = static_cast<int32_t>(nodes_.size());
      nodes_.push_back({segment});
    }
    return segment->plan_node;
  }

  void link(int32_t above, int32_t below) {
    int32_t& first = above < 0 ? first_root_ : nodes_[above].first_child;
    int32_t& last = above < 0 ? last_root_ : nodes_[above].last_child;
    nodes_[below].parent = above;
    (last < 0 ? first : nodes_[last].next) = below;
    last = below;
  }

  void enter(Node& node) {
    const Segment& s = *node.segment;
    node.row_begin = num_rows();
    const bool own = node.to > node.from;
    if (own) add_rows(node);
    const int32_t stop = own ? node.to : s.end();
    const int32_t whole_stop = tree_.floor_page(stop) << tree_.shift;
    const int32_t base = tree_.floor_page(s.start) << tree_.shift;
    if (whole_stop > base) {
      node.whole = static_cast<int32_t>(out_.node_pos.size());
      add_attention(s, base, whole_stop, node.row_begin);
    }
    // Below this segment the partial page is read through the child's own copy.
    if (own && stop > whole_stop) add_attention(s, whole_stop, stop, node.row_begin);
  }

  void leave(const Node& node) {
    if (node.whole >= 0) out_.node_row_end[node.whole] = num_rows();
  }

  void add_rows(const Node& node) {
    Segment& s = *node.segment;
    const int32_t base = tree_.floor_page(s.start);
    for (int32_t p = node.from; p < node.to; ++p) {
      out_.token_ids.push_back(s.tokens[p - s.start]);
      out_.positions.push_back(p);
      const int32_t page = s.pages[tree_.floor_page(p) - base];
      out_.slots.push_back(node.refresh ? -1 : (page << tree_.shift) + tree_.offset(p));
    }
    out_.item_indptr.push_back(num_rows());
    if (node.refresh) return;
    items_.push_back({&s, node.from, node.to});
    if (s.pending_src >= 0) {
      const int32_t copy[] = {s.pending_src, s.pages.front(), tree_.offset(s.start)};
      out_.copies.insert(out_.copies.end(), copy, copy + 3);
    }
  }

  // An attention node over positions [from, to) of the segment's pages, for the rows so far.
  void add_attention(const Segment& s, int32_t from, int32_t to, int32_t row_begin) {
    const int32_t base = tree_.floor_page(s.start);
    out_.node_pos.push_back(from);
    out_.node_len.push_back(to - from);
    out_.node_row_begin.push_back(row_begin);
    out_.node_row_end.push_back(num_rows());
    out_.page_indices.insert(out_.page_indices.end(),
                             s.pages.begin() + (tree_.floor_page(from) - base),
                             s.pages.begin() + (tree_.ceil_page(to) - base));
    out_.node_page_indptr.push_back(static_cast<int32_t>(out_.page_indices.size()));
  }

  int32_t num_rows() const { return static_cast<int32_t>(out_.positions.size()); }

  SegmentTree& tree_;
  const int64_t mark_;
  PlanArrays& out_;
  std::vector<Node> nodes_;
  std::vector<FlightItem> items_;
  int32_t first_root_ = -1, last_root_ = -1;
  bool fresh_ = false;  // the last add() met its segment for the first time
};

}  // namespace

std::vector<FlightItem> build_plan(SegmentTree& tree, const std::vector<Segment*>& tails,
                                   const int32_t* quotas, int64_t mark, PlanArrays& arrays) {
  Builder builder(tree, mark, arrays);
  for (size_t i = 0; i < tails.size(); ++i) builder.request(tails[i], quotas[i]);
  builder.emit_all();
  arrays.logits_row.reserve(tails.size());
  for (Segment* tail : tails) arrays.logits_row.push_back(builder.logits_row(tail));
  return builder.take_items();
}

}  // namespace dendrite
