#include "prefix_index.h"

#include <algorithm>

namespace dendrite {

namespace {

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

}  // namespace

PrefixIndex::PrefixIndex(PagePool& pool, bool enabled) : pool_(pool), enabled_(enabled) {
  if (!enabled) return;
  nodes_.resize(pool.num_pages());
  tokens_.resize(static_cast<size_t>(pool.num_pages()) * pool.page_size());
}

const int32_t* PrefixIndex::tokens(int32_t page) const {
  return tokens_.data() + static_cast<size_t>(page) * pool_.page_size();
}

uint64_t PrefixIndex::hash_of(int32_t name, int32_t parent, const int32_t* tokens) const {
  // The hash only finds candidates; equality is always decided on the exact token ids.
  uint64_t hash = mix((static_cast<uint64_t>(static_cast<uint32_t>(name)) << 32) ^
                      static_cast<uint32_t>(parent));
  for (int32_t i = 0; i < pool_.page_size(); ++i) {
    hash = mix(hash ^ static_cast<uint32_t>(tokens[i]));
  }
  return hash;
}

int32_t PrefixIndex::find(int32_t name, int32_t parent, const int32_t* tokens) const {
  auto found = by_hash_.find(hash_of(name, parent, tokens));
  int32_t page = found == by_hash_.end() ? -1 : found->second;
  for (; page >= 0; page = nodes_[page].next_same_hash) {
    const IndexNode& node = nodes_[page];
    if (node.name == name && node.parent == parent &&
        std::equal(tokens, tokens + pool_.page_size(), this->tokens(page))) {
      return page;
    }
  }
  return -1;
}

std::vector<int32_t> PrefixIndex::match(int32_t name, const int32_t* tokens,
                                        int32_t max_pages) const {
  std::vector<int32_t> path;
  if (!enabled_ || name < 0) return path;
  int32_t parent = -1;
  for (int32_t k = 0; k < max_pages; ++k) {
    parent = find(name, parent, tokens + static_cast<size_t>(k) * pool_.page_size());
    if (parent < 0) break;
    path.push_back(parent);
  }
  return path;
}

void PrefixIndex::insert(int32_t page, int32_t name, int32_t parent, const int32_t* tokens,
                         Segment* owner) {
  IndexNode& node = nodes_[page];
  node = IndexNode{};
  node.parent = parent;
  node.name = name;
  node.owner = owner;
  node.hash = hash_of(name, parent, tokens);
  std::copy(tokens, tokens + pool_.page_size(),
            tokens_.begin() + static_cast<size_t>(page) * pool_.page_size());
  auto [entry, fresh] = by_hash_.try_emplace(node.hash, page);
  if (!fresh) {
    node.next_same_hash = entry->second;
    entry->second = page;
  }
  if (parent >= 0) {
    IndexNode& above = nodes_[parent];
    node.next = above.first_child;
    if (node.next >= 0) nodes_[node.next].prev = page;
    above.first_child = page;
    ++above.num_children;
  }
  names_.hold(name);
  pool_.ref(page);
  pool_.set_indexed(page, true);
}

void PrefixIndex::forget_hash(int32_t page) {
  auto entry = by_hash_.find(nodes_[page].hash);
  int32_t* link = &entry->second;
  while (*link != page) link = &nodes_[*link].next_same_hash;
  *link = nodes_[page].next_same_hash;
  if (entry->second < 0) by_hash_.erase(entry);
}

void PrefixIndex::unlink(int32_t page) {
  IndexNode& node = nodes_[page];
  if (node.prev >= 0) nodes_[node.prev].next = node.next;
  if (node.next >= 0) nodes_[node.next].prev = node.prev;
  if (node.parent < 0) return;
  IndexNode& above = nodes_[node.parent];
  if (above.first_child == page) above.first_child = node.next;
  --above.num_children;
}

void PrefixIndex::remove(int32_t page) {
  forget_hash(page);
  unlink(page);
  names_.drop(nodes_[page].name);
  nodes_[page] = IndexNode{};
  pool_.set_indexed(page, false);
  pool_.unref(page);
}

void PrefixIndex::free_cached(int32_t page) {
  lru_.erase({nodes_[page].tick, page});
  --num_cached_;
  ++num_evicted_;
  remove(page);
  pool_.put_back(page);
}

void PrefixIndex::remove_subtree(int32_t page) {
  // Breadth first, so that walking the list backwards meets every child before its parent.
  std::vector<int32_t> below;
  for (int32_t at = page, i = -1;; at = below[i]) {
    for (int32_t c = nodes_[at].first_child; c >= 0; c = nodes_[c].next) below.push_back(c);
    if (++i == static_cast<int32_t>(below.size())) break;
  }
  // Oldest first. A child became cached before its parent did, so this too is children first.
  std::sort(below.begin(), below.end(),
            [&](int32_t a, int32_t b) { return nodes_[a].tick < nodes_[b].tick; });
  for (int32_t each : below) free_cached(each);
  remove(page);
}

void PrefixIndex::make_cached(int32_t page) {
  IndexNode& node = nodes_[page];
  node.cached = true;
  node.owner = nullptr;
  node.tick = ++tick_;
  ++num_cached_;
  lru_.emplace(node.tick, page);
}

void PrefixIndex::make_live(int32_t page) {
  IndexNode& node = nodes_[page];
  if (!node.cached) return;
  lru_.erase({node.tick, page});
  node.cached = false;
  --num_cached_;
}

void PrefixIndex::evict_one() { free_cached(lru_.begin()->second); }

}  // namespace dendrite
