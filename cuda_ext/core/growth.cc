// How segments grow: create, append (copy-on-write), and what a committed plan changes.
#include <algorithm>
#include <limits>

#include "errors.h"
#include "segment_tree.h"

namespace dendrite {

void SegmentTree::check_pages(int64_t need, int32_t protected_cached) const {
  const int64_t evictable = index.num_cached() - protected_cached;
  if (need <= pool.num_free() + evictable) return;
  throw OutOfPagesError(need, pool.num_free(), evictable, pool.num_pages());
}

void SegmentTree::take_pages(int32_t count, std::vector<int32_t>& pages, bool retain) {
  while (pool.num_free() < count) index.evict_one();
  for (int32_t i = 0; i < count; ++i) {
    pages.push_back(pool.take());
    if (retain) pool.retain(pages.back());
  }
}

Segment* SegmentTree::append(Segment* tail, const int32_t* tokens, const float* logprobs,
                             int32_t count, bool retain) {
  if (count == 0) return tail;
  const int32_t end = tail->end();
  // In place only for the sole owner of the tail and of its last page: any other reference to that
  // page (a cut segment, a copy on its way, the index) still reads slots that would be overwritten.
  const bool in_place =
      tail->refs == 1 && (offset(end) == 0 || pool.refs(tail->pages.back()) == 1);
  const int64_t last_page = (static_cast<int64_t>(end) + count + page_size - 1) >> shift;
  const int64_t need = last_page - (in_place ? ceil_page(end) : floor_page(end));
  check_pages(need);

  Segment* target = tail;
  if (!in_place) {
    target = hang(tail, end, tail->name);  // takes over the handle's reference to `tail`
    --tail->refs;
    target->refs = 1;
    if (offset(end)) {
      target->pending_src = tail->pages.back();
      pool.ref(target->pending_src);
      ++counters.cow_copies;
    }
  } else if (offset(end)) {
    pool.unseal(tail->pages.back());
    if (retain) pool.retain(tail->pages.back());
  }
  take_pages(static_cast<int32_t>(need), target->pages, retain);
  target->tokens.insert(target->tokens.end(), tokens, tokens + count);
  if (logprobs) {
    target->logprobs.insert(target->logprobs.end(), logprobs, logprobs + count);
  } else {
    target->logprobs.resize(target->tokens.size(), std::numeric_limits<float>::quiet_NaN());
  }
  return target;
}

Segment* SegmentTree::create(const int32_t* tokens, int32_t count, const std::string& name,
                             int32_t* num_cached) {
  // At least one token is always computed: its logits are what the caller asks for next.
  const std::vector<int32_t> path =
      index.match(index.names().find(name), tokens, (count - 1) >> shift);
  const auto matched = static_cast<int32_t>(path.size());
  int32_t owned = 0, cached = 0;
  for (int32_t page : path) {
    if (index.node(page).owner) ++owned;
    if (index.node(page).cached) ++cached;
  }
  const int64_t need = ((static_cast<int64_t>(count) + page_size - 1) >> shift) - matched;
  check_pages(need, cached);

  // Pages that a live segment holds to their last slot form a prefix of the path: hang below that
  // segment, so that attention reads them once for all.
  Segment* parent = nullptr;
  const int32_t start = owned << shift;
  if (owned > 0) {
    Segment* owner = index.node(path[owned - 1]).owner;
    parent = owner->end() > start ? split(owner, start) : owner;
  }
  const int32_t name_id = index.names().hold(name);
  Segment* tail = hang(parent, start, name_id);
  index.names().drop(name_id);
  tail->refs = 1;
  for (int32_t k = 0; k < matched; ++k) {
    pool.retain(path[k]);
    if (k < owned) continue;
    index.make_live(path[k]);
    pool.ref(path[k]);
    index.set_owner(path[k], tail);
    tail->pages.push_back(path[k]);
  }
  take_pages(static_cast<int32_t>(need), tail->pages, true);
  tail->tokens.assign(tokens + start, tokens + count);
  tail->logprobs.assign(count - start, std::numeric_limits<float>::quiet_NaN());
  tail->computed = *num_cached = matched << shift;
  if (matched > 0) ++counters.prefix_hits;
  counters.prefix_hit_tokens += *num_cached;
  return tail;
}

Segment* SegmentTree::segment_ending_at(Segment* tail, int32_t position) {
  while (tail->start >= position) tail = tail->parent;
  return tail->end() > position ? split(tail, position) : tail;
}

void SegmentTree::unindex_partial_page(Segment* tail) {
  if (tail->refs != 1 || offset(tail->end()) == 0) return;
  const int32_t page = tail->pages.back();
  // One listing and the index entry: nobody else holds the dropped slots, they will be rewritten.
  if (pool.indexed(page) && pool.refs(page) == 2) index.remove_subtree(page);
}

void SegmentTree::index_page(Segment* segment, int32_t k) {
  const int32_t page = page_at(segment, k);
  pool.seal(page);
  if (!index.enabled() || pool.indexed(page)) return;
  const int32_t parent = k == 0 ? -1 : page_at(segment, k - 1);
  if (parent >= 0 && !pool.indexed(parent)) return;
  std::vector<int32_t> tokens(page_size);
  copy_tokens(segment, k << shift, (k + 1) << shift, tokens.data());
  if (index.find(segment->name, parent, tokens.data()) >= 0) return;
  index.insert(page, segment->name, parent, tokens.data(), segment);
}

void SegmentTree::commit_items(std::vector<FlightItem> items) {
  // A split moved the head of an item to the end of the list; pages enter the index root first.
  std::stable_sort(items.begin(), items.end(),
                   [](const FlightItem& a, const FlightItem& b) { return a.from < b.from; });
  for (const FlightItem& item : items) {
    Segment* segment = item.segment;
    if (!segment) continue;
    --segment->in_flight;
    if (item.to <= segment->computed || item.from > segment->computed) continue;
    const int32_t before = segment->computed;
    segment->computed = item.to;
    if (segment->pending_src >= 0) {
      drop_page(segment->pending_src);
      segment->pending_src = -1;
    }
    for (int32_t k = floor_page(before); (k + 1) << shift <= item.to; ++k) index_page(segment, k);
  }
  settle(items);
}

void SegmentTree::cancel_items(std::vector<FlightItem> items) {
  for (const FlightItem& item : items) {
    if (item.segment) --item.segment->in_flight;
  }
  settle(items);
}

// Merges that had to wait for the copies of a flight.
void SegmentTree::settle(std::vector<FlightItem>& items) {
  for (size_t i = 0; i < items.size(); ++i) {
    Segment* segment = items[i].segment;
    if (!segment) continue;
    while (Segment* parent = segment->parent) {
      if (parent->refs != 1 || parent->num_children != 1) break;
      if (!merge_into_child(parent, segment)) break;
      for (FlightItem& other : items) {
        if (other.segment == parent) other.segment = segment;
      }
    }
  }
}

}  // namespace dendrite
