// Radix tree over whole computed pages, keyed by exact token ids, one root per namespace.
//
// Invariants: a node's parent is the page before it in the chain that inserted it, so a live page
// has a live parent and the descendants of a cached page are all cached (cached == evictable).
// Of two nodes under one parent the tokens differ. The index holds one page reference per node.
#pragma once

#include <cstdint>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "namespaces.h"
#include "page_pool.h"

namespace dendrite {

struct Segment;

struct IndexNode {
  int32_t parent = -1;  // page, -1 under the root
  int32_t name = -1;    // namespace id
  int32_t first_child = -1, next = -1, prev = -1, num_children = 0;
  int32_t next_same_hash = -1;
  uint64_t hash = 0;
  uint64_t tick = 0;         // when it became cached
  Segment* owner = nullptr;  // live segment that holds the last slot of the page, if any
  bool cached = false;
};

class PrefixIndex {
 public:
  PrefixIndex(PagePool& pool, bool enabled);

  bool enabled() const { return enabled_; }
  int32_t num_cached() const { return num_cached_; }
  int64_t num_evicted() const { return num_evicted_; }
  const IndexNode& node(int32_t page) const { return nodes_[page]; }
  const int32_t* tokens(int32_t page) const;
  bool is_cached(int32_t page) const { return enabled_ && nodes_[page].cached; }
  bool in_lru(int32_t page) const { return lru_.count({nodes_[page].tick, page}) > 0; }
  Namespaces& names() { return names_; }
  const Namespaces& names() const { return names_; }

  // The page under `parent` (-1: root) with these page_size tokens, or -1. O(page_size).
  int32_t find(int32_t name, int32_t parent, const int32_t* tokens) const;
  // The longest indexed path of at most `max_pages` whole pages of `tokens`.
  std::vector<int32_t> match(int32_t name, const int32_t* tokens, int32_t max_pages) const;

  void insert(int32_t page, int32_t name, int32_t parent, const int32_t* tokens, Segment* owner);
  // Takes a page without children out of the index and drops the index's reference.
  void remove(int32_t page);
  // Takes a page and every (cached) page below it out; the pages below are freed.
  void remove_subtree(int32_t page);
  void set_owner(int32_t page, Segment* owner) { nodes_[page].owner = owner; }

  void make_cached(int32_t page);
  void make_live(int32_t page);
  // Frees the least recently used cached page; the caller knows that there is one. It is a leaf: a
  // page becomes cached after all pages below it.
  void evict_one();

 private:
  uint64_t hash_of(int32_t name, int32_t parent, const int32_t* tokens) const;
  void unlink(int32_t page);
  void forget_hash(int32_t page);
  void free_cached(int32_t page);

  PagePool& pool_;
  bool enabled_;
  int32_t num_cached_ = 0;
  int64_t num_evicted_ = 0;
  uint64_t tick_ = 0;
  std::vector<IndexNode> nodes_;  // by page
  std::vector<int32_t> tokens_;   // [num_pages, page_size]
  std::unordered_map<uint64_t, int32_t> by_hash_;
  std::set<std::pair<uint64_t, int32_t>> lru_;  // cached pages by tick
  Namespaces names_;
};

}  // namespace dendrite
