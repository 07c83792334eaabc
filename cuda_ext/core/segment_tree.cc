#include "segment_tree.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace dendrite {

SegmentTree::SegmentTree(int32_t num_pages, int32_t page_size, bool prefix_cache, bool debug)
    : page_size(page_size),
      shift(std::countr_zero(static_cast<uint32_t>(page_size))),
      pool(num_pages, page_size, debug),
      index(pool, prefix_cache) {}

SegmentTree::~SegmentTree() {
  for (Segment* segment : all) delete segment;
}

int32_t SegmentTree::page_at(const Segment* segment, int32_t k) const {
  while (floor_page(segment->start) > k) segment = segment->parent;
  return segment->pages[k - floor_page(segment->start)];
}

void SegmentTree::copy_tokens(const Segment* tail, int32_t start, int32_t stop,
                              int32_t* out) const {
  for (const Segment* s = tail; s && s->end() > start; s = s->parent) {
    const int32_t from = std::max(start, s->start), to = std::min(stop, s->end());
    if (from >= to) continue;
    std::copy(s->tokens.begin() + (from - s->start), s->tokens.begin() + (to - s->start),
              out + (from - start));
  }
}

void SegmentTree::copy_logprobs(const Segment* tail, int32_t start, float* out) const {
  for (const Segment* s = tail; s && s->end() > start; s = s->parent) {
    const int32_t from = std::max(start, s->start);
    std::copy(s->logprobs.begin() + (from - s->start), s->logprobs.end(), out + (from - start));
  }
}

void SegmentTree::set_logprobs(Segment* tail, int32_t start, int32_t stop, const float* values) {
  for (Segment* s = tail; s && s->end() > start; s = s->parent) {
    const int32_t from = std::max(start, s->start), to = std::min(stop, s->end());
    if (from >= to) continue;
    std::copy(values + (from - start), values + (to - start),
              s->logprobs.begin() + (from - s->start));
  }
}

int32_t SegmentTree::num_computed(const Segment* tail) {
  while (tail->computed == tail->start && tail->parent) tail = tail->parent;
  return tail->computed;
}

Segment* SegmentTree::hang(Segment* parent, int32_t start, int32_t name) {
  auto* segment = new Segment;
  segment->id = next_segment_id++;
  segment->start = segment->computed = start;
  segment->name = name;
  segment->index = static_cast<int32_t>(all.size());
  all.push_back(segment);
  index.names().hold(name);
  segment->parent = parent;
  if (parent) {
    segment->next = parent->first_child;
    if (segment->next) segment->next->prev = segment;
    parent->first_child = segment;
    ++parent->num_children;
    ++parent->refs;
  }
  return segment;
}

void SegmentTree::unlink(Segment* segment) {
  Segment* parent = segment->parent;
  if (!parent) return;
  if (segment->prev) segment->prev->next = segment->next;
  if (segment->next) segment->next->prev = segment->prev;
  if (parent->first_child == segment) parent->first_child = segment->next;
  --parent->num_children;
  segment->prev = segment->next = nullptr;
}

void SegmentTree::replace_child(Segment* parent, Segment* old_child, Segment* new_child) {
  new_child->parent = parent;
  new_child->prev = old_child->prev;
  new_child->next = old_child->next;
  if (new_child->prev) new_child->prev->next = new_child;
  if (new_child->next) new_child->next->prev = new_child;
  if (parent && parent->first_child == old_child) parent->first_child = new_child;
  old_child->prev = old_child->next = nullptr;
}

void SegmentTree::destroy(Segment* segment) {
  all.back()->index = segment->index;
  all[segment->index] = all.back();
  all.pop_back();
  index.names().drop(segment->name);
  delete segment;
}

Segment* SegmentTree::split(Segment* segment, int32_t position) {
  Segment* head = hang(nullptr, segment->start, segment->name);
  const int32_t base = floor_page(segment->start);
  const int32_t kept = position - segment->start;
  const int32_t head_pages = ceil_page(position) - base;
  const int32_t tail_first = floor_page(position) - base;

  // The longer run usually is the head: it takes the buffers, the rest is copied out of them.
  head->tokens = std::move(segment->tokens);
  head->logprobs = std::move(segment->logprobs);
  head->pages = std::move(segment->pages);
  segment->tokens.assign(head->tokens.begin() + kept, head->tokens.end());
  segment->logprobs.assign(head->logprobs.begin() + kept, head->logprobs.end());
  segment->pages.assign(head->pages.begin() + tail_first, head->pages.end());
  head->tokens.resize(kept);
  head->logprobs.resize(kept);
  head->pages.resize(head_pages);
  if (offset(position)) pool.ref(segment->pages.front());  // both list the page that is cut

  head->pending_src = std::exchange(segment->pending_src, -1);
  head->computed = std::min(segment->computed, position);
  segment->computed = std::max(segment->computed, position);
  segment->start = position;
  replace_child(segment->parent, segment, head);
  head->first_child = segment;
  head->num_children = head->refs = 1;
  segment->parent = head;

  if (index.enabled()) {
    for (int32_t i = 0; i < tail_first; ++i) {
      const int32_t page = head->pages[i];
      if (index.node(page).owner == segment) index.set_owner(page, head);
    }
  }
  if (segment->in_flight == 0) return head;
  for (auto& [id, items] : flights) {
    for (size_t i = 0, n = items.size(); i < n; ++i) {
      FlightItem& item = items[i];
      if (item.segment != segment || item.from >= position) continue;
      ++head->in_flight;
      if (item.to <= position) {
        item.segment = head;
        --segment->in_flight;
      } else {
        const int32_t from = std::exchange(item.from, position);
        items.push_back({head, from, position});
      }
    }
  }
  return head;
}

void SegmentTree::drop_page(int32_t page) {
  const int32_t left = pool.unref(page);
  if (left - (pool.indexed(page) ? 1 : 0) > 0) return;
  ++num_released;
  if (pool.indexed(page)) {
    if (pool.retained(page) || index.node(page).num_children > 0) {
      index.make_cached(page);
      return;
    }
    index.remove(page);
  }
  pool.put_back(page);
}

void SegmentTree::release(Segment* segment) {
  while (segment) {
    if (--segment->refs > 0) {
      if (segment->refs == 1 && segment->num_children == 1) try_merge(segment);
      return;
    }
    for (auto page = segment->pages.rbegin(); page != segment->pages.rend(); ++page) {
      if (index.enabled() && index.node(*page).owner == segment) index.set_owner(*page, nullptr);
      drop_page(*page);
    }
    if (segment->pending_src >= 0) drop_page(segment->pending_src);
    if (segment->in_flight > 0) {
      for (auto& [id, items] : flights) {
        for (FlightItem& item : items) {
          if (item.segment == segment) item.segment = nullptr;
        }
      }
    }
    Segment* parent = segment->parent;
    unlink(segment);
    destroy(segment);
    segment = parent;
  }
}

void SegmentTree::try_merge(Segment* segment) {
  while (segment->refs == 1 && segment->num_children == 1) {
    Segment* child = segment->first_child;
    if (!merge_into_child(segment, child)) return;
    segment = child;
  }
}

// Decides which of the two pages around the seam stays. False: not now (the copy is on its way, or
// somebody else needs the source page as it is, or reads the child's page).
bool SegmentTree::join_pages(Segment* parent, Segment* child) {
  if (offset(child->start)) {
    const int32_t upper = parent->pages.back(), lower = child->pages.front();
    if (child->pending_src >= 0) {
      if (child->in_flight > 0 || pool.refs(upper) != 2 || pool.refs(lower) != 1) return false;
      child->pending_src = -1;  // the parent's page has no other reader: go on in place
      drop_page(upper);
      pool.unseal(upper);
      if (pool.retained(lower)) pool.retain(upper);
      drop_page(lower);
      child->pages.erase(child->pages.begin());
    } else if (upper == lower) {
      drop_page(upper);
      child->pages.erase(child->pages.begin());
    } else {
      parent->pages.pop_back();  // the copy has run: the child's page holds these slots
      drop_page(upper);
    }
  }
  parent->pages.insert(parent->pages.end(), child->pages.begin(), child->pages.end());
  child->pages = std::move(parent->pages);
  return true;
}

bool SegmentTree::merge_into_child(Segment* parent, Segment* child) {
  const int32_t parent_end = parent->end();
  if (!join_pages(parent, child)) return false;
  parent->tokens.insert(parent->tokens.end(), child->tokens.begin(), child->tokens.end());
  parent->logprobs.insert(parent->logprobs.end(), child->logprobs.begin(), child->logprobs.end());
  child->tokens = std::move(parent->tokens);
  child->logprobs = std::move(parent->logprobs);
  if (parent->computed < parent_end) child->computed = parent->computed;
  child->start = parent->start;
  child->pending_src = parent->pending_src;
  if (index.enabled()) {
    for (int32_t page : child->pages) {
      if (index.node(page).owner == parent) index.set_owner(page, child);
    }
  }
  if (parent->in_flight > 0) {
    for (auto& [id, items] : flights) {
      for (FlightItem& item : items) {
        if (item.segment == parent) item.segment = child;
      }
    }
    child->in_flight += parent->in_flight;
  }
  replace_child(parent->parent, parent, child);
  destroy(parent);
  return true;
}

}  // namespace dendrite
