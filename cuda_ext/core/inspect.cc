// Reading the tree: page tables, per-branch columns, statistics and the canonical dump.
#include <algorithm>

#include "errors.h"
#include "tree_core.h"

namespace dendrite {

namespace {

using Lock = std::lock_guard<std::mutex>;

}  // namespace

PageTables TreeCore::page_tables(const Handle* branches, size_t count) const {
  PageTables out;
  Lock lock(mutex_);
  for (const Segment* tail : tails_of(branches, count)) {
    const size_t base = out.indices.size();
    int32_t stop = tree_.ceil_page(tail->end());
    out.indices.resize(base + stop);
    // Deepest first: a segment's own first page stands in for its parent's partial one.
    for (const Segment* s = tail; s; s = s->parent) {
      const int32_t first = tree_.floor_page(s->start);
      std::copy_n(s->pages.begin(), std::max(0, stop - first), out.indices.begin() + base + first);
      stop = std::min(stop, first);
    }
    out.indptr.push_back(static_cast<int32_t>(out.indices.size()));
    out.last_page_len.push_back(tree_.offset(tail->end() - 1) + 1);
  }
  return out;
}

// Pages that pruning the only handle chain at `tail` would release, the page that the merge above
// it gives back included.
int32_t TreeCore::count_owned(Segment* tail) const {
  int32_t owned = 0;
  std::vector<int32_t> touched;
  auto drop = [&](int32_t page) {
    touched.push_back(page);
    if (++scratch_[page] == tree_.pool.live_refs(page)) ++owned;
  };
  Segment* s = tail;
  for (; s && s->refs == 1; s = s->parent) {
    for (int32_t page : s->pages) drop(page);
    if (s->pending_src >= 0) drop(s->pending_src);
    tail = s;
  }
  // `s` survives; with one child left besides the dying one it merges and may drop a page.
  const bool through_child = s && s != tail;
  if (s && s->refs == 2 && s->num_children == 1 + (through_child ? 1 : 0)) {
    Segment* child = s->first_child;
    if (through_child && child == tail) child = child->next;
    const int32_t upper = s->pages.back(), lower = child->pages.front();
    if (tree_.offset(child->start) && upper != lower) {
      if (child->pending_src < 0) {
        drop(upper);
      } else if (child->in_flight == 0 && tree_.pool.refs(lower) == 1 &&
                 tree_.pool.refs(upper) - scratch_[upper] == 2) {
        drop(lower);
      }
    }
  }
  for (int32_t page : touched) scratch_[page] = 0;
  return owned;
}

BranchColumns TreeCore::describe(const Handle* branches, size_t count) const {
  BranchColumns out;
  for (auto column : {&out.num_tokens, &out.num_computed, &out.pages, &out.owned_pages,
                      &out.tail_refs, &out.segments}) {
    column->assign(count, -1);
  }
  Lock lock(mutex_);
  for (size_t i = 0; i < count; ++i) {
    Segment* tail = find_tail(branches[i]);
    if (!tail) continue;
    out.num_tokens[i] = tail->end();
    out.num_computed[i] = SegmentTree::num_computed(tail);
    out.pages[i] = tree_.ceil_page(tail->end());
    out.owned_pages[i] = count_owned(tail);
    out.tail_refs[i] = tail->refs;
    out.segments[i] = 0;
    for (const Segment* s = tail; s; s = s->parent) ++out.segments[i];
  }
  return out;
}

std::vector<SegmentInfo> TreeCore::segments(Handle branch) const {
  std::vector<SegmentInfo> out;
  Lock lock(mutex_);
  for (const Segment* s = tail_of(branch); s; s = s->parent) {
    out.push_back({s->id, s->start, s->end() - s->start, s->refs, s->pages});
  }
  std::reverse(out.begin(), out.end());
  return out;
}

uint8_t TreeCore::page_state_of(int32_t page) const {
  if (tree_.pool.refs(page) == 0) return 0;
  return tree_.index.is_cached(page) ? 2 : 1;
}

std::vector<int32_t> TreeCore::page_refs() const {
  Lock lock(mutex_);
  std::vector<int32_t> out(num_pages());
  for (int32_t page = 0; page < num_pages(); ++page) out[page] = tree_.pool.refs(page);
  return out;
}

std::vector<uint8_t> TreeCore::page_state() const {
  Lock lock(mutex_);
  std::vector<uint8_t> out(num_pages());
  for (int32_t page = 0; page < num_pages(); ++page) out[page] = page_state_of(page);
  return out;
}

// Branches below each live page, 0 for the others. O(segments + pages listed).
std::vector<int32_t> TreeCore::count_holders() const {
  std::vector<Segment*> order;  // parents before children
  order.reserve(tree_.all.size());
  for (Segment* s : tree_.all) {
    if (!s->parent) order.push_back(s);
  }
  for (size_t i = 0; i < order.size(); ++i) {
    for (Segment* c = order[i]->first_child; c; c = c->next) order.push_back(c);
  }
  std::vector<int32_t> below(tree_.all.size());
  for (auto it = order.rbegin(); it != order.rend(); ++it) {
    Segment* s = *it;
    below[s->index] += s->refs - s->num_children;
    if (s->parent) below[s->parent->index] += below[s->index];
  }
  std::vector<int32_t> holders(num_pages(), 0);
  for (Segment* s : order) {
    for (int32_t page : s->pages) holders[page] += below[s->index];
    // A page cut by a split is listed above too, and counted there for everybody below.
    if (s->parent && s->parent->pages.back() == s->pages.front()) {
      holders[s->pages.front()] -= below[s->index];
    }
  }
  return holders;
}

std::vector<std::pair<const char*, int64_t>> TreeCore::stats() const {
  Lock lock(mutex_);
  const std::vector<int32_t> holders = count_holders();
  const int64_t shared =
      std::count_if(holders.begin(), holders.end(), [](int32_t n) { return n > 1; });
  const PagePool& pool = tree_.pool;
  const Counters& c = tree_.counters;
  int64_t branches = 0;
  for (const Slot& slot : slots_) branches += slot.tail && !slot.is_draft;
  return {{"pages_total", pool.num_pages()},
          {"pages_free", pool.num_free()},
          {"pages_live", pool.num_pages() - pool.num_free() - tree_.index.num_cached()},
          {"pages_shared", shared},
          {"pages_cached", tree_.index.num_cached()},
          {"branches", branches},
          {"segments", static_cast<int64_t>(tree_.all.size())},
          {"forks", c.forks},
          {"prunes", c.prunes},
          {"rollbacks", c.rollbacks},
          {"cow_copies", c.cow_copies},
          {"evictions", tree_.index.num_evicted()},
          {"prefix_hits", c.prefix_hits},
          {"prefix_hit_tokens", c.prefix_hit_tokens},
          {"pages_taken", pool.num_taken()}};
}

std::map<int32_t, int32_t> TreeCore::refcount_histogram() const {
  Lock lock(mutex_);
  std::map<int32_t, int32_t> out;
  for (int32_t holders : count_holders()) {
    if (holders > 0) ++out[holders];
  }
  return out;
}

Dump TreeCore::dump() const {
  Lock lock(mutex_);
  Dump out;
  for (const Segment* s : tree_.all) {
    out.segments.push_back({s->id, s->parent ? s->parent->id : -1, s->start, s->computed, s->refs,
                            s->pending_src, tree_.index.names().name(s->name), s->tokens, s->pages,
                            s->logprobs});
  }
  std::sort(out.segments.begin(), out.segments.end(),
            [](const SegmentDump& a, const SegmentDump& b) { return a.id < b.id; });
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto handle = static_cast<Handle>(slots_[i].generation) << 32 | static_cast<Handle>(i);
    if (slots_[i].tail) out.branches.emplace_back(handle, slots_[i].tail->id);
  }
  std::sort(out.branches.begin(), out.branches.end());
  for (uint32_t slot : free_slots_) {
    out.free_handles.push_back(static_cast<Handle>(slots_[slot].generation) << 32 | slot);
  }
  out.free_list = tree_.pool.free_list();
  for (int32_t page = 0; page < num_pages(); ++page) {
    out.page_refs.push_back(tree_.pool.refs(page));
    out.page_state.push_back(page_state_of(page));
    if (tree_.pool.retained(page)) out.retained.push_back(page);
    if (out.page_state.back() == 2) out.lru.push_back(page);
    if (!tree_.pool.indexed(page)) continue;
    const IndexNode& node = tree_.index.node(page);
    const int32_t* tokens = tree_.index.tokens(page);
    out.index.push_back({page, node.parent, tree_.index.names().name(node.name),
                         std::vector<int32_t>(tokens, tokens + page_size()),
                         node.owner ? node.owner->id : -1});
  }
  std::sort(out.lru.begin(), out.lru.end(), [&](int32_t a, int32_t b) {
    return tree_.index.node(a).tick < tree_.index.node(b).tick;
  });
  std::map<int64_t, std::vector<std::vector<int64_t>>> by_plan;
  for (const auto& [id, items] : tree_.flights) {
    auto& rows = by_plan[id];
    for (const FlightItem& item : items) {
      if (item.segment) rows.push_back({item.segment->id, item.from, item.to});
    }
    std::sort(rows.begin(), rows.end());
  }
  for (auto& [id, rows] : by_plan) out.flights.push_back(std::move(rows));
  return out;
}

}  // namespace dendrite
