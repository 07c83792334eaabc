// The tree of segments: append-only runs of tokens with the pages that hold their K and V.
//
// Invariants, recounted by integrity.cc:
//  - refs = branch handles whose tail this is + child segments; a segment with refs 0 is gone.
//  - pages cover positions floor(start) .. end rounded to whole pages (page-aligned ownership):
//    when start is inside a page, the first page holds the slots before start too, so readers
//    below use it instead of the parent's partial page.
//  - computed > start only when the parent is computed up to its end.
//  - a segment with a pending copy has computed == start; the source is the parent's last page.
//  - no segment is held by a single child alone, unless that child's copy is still pending.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "page_pool.h"
#include "prefix_index.h"

namespace dendrite {

struct Segment {
  int64_t id = 0;
  Segment* parent = nullptr;
  Segment *first_child = nullptr, *next = nullptr, *prev = nullptr;
  int32_t num_children = 0;
  int32_t refs = 0;
  int32_t start = 0;
  int32_t computed = 0;     // absolute position; K and V of [start, computed) are in the pages
  int32_t name = -1;        // namespace id
  int32_t in_flight = 0;    // flight items that point here
  int32_t pending_src = -1; // page whose first start % page_size slots go to pages[0], or -1
  int32_t index = 0;        // place in SegmentTree::all
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;  // NaN = none
  std::vector<int32_t> pages;
  int64_t plan_mark = 0;  // scratch of the plan builder
  int32_t plan_node = 0;

  int32_t end() const { return start + static_cast<int32_t>(tokens.size()); }
};

// Tokens [from, to) of a segment that a plan is computing. Splits and merges move items along with
// the tokens; a death drops them (segment == nullptr).
struct FlightItem {
  Segment* segment;
  int32_t from, to;
};

struct Counters {
  int64_t forks = 0, prunes = 0, rollbacks = 0, cow_copies = 0, prefix_hits = 0,
          prefix_hit_tokens = 0;
};

class SegmentTree {
 public:
  SegmentTree(int32_t num_pages, int32_t page_size, bool prefix_cache, bool debug);
  ~SegmentTree();
  SegmentTree(const SegmentTree&) = delete;
  SegmentTree& operator=(const SegmentTree&) = delete;

  // --- positions ---
  int32_t floor_page(int32_t position) const { return position >> shift; }
  int32_t ceil_page(int32_t position) const { return (position + page_size - 1) >> shift; }
  int32_t offset(int32_t position) const { return position & (page_size - 1); }
  // The page that readers of `segment`'s chain use for page number k.
  int32_t page_at(const Segment* segment, int32_t k) const;
  // Tokens [start, stop) of the chain that ends in `tail`, stop <= tail->end().
  void copy_tokens(const Segment* tail, int32_t start, int32_t stop, int32_t* out) const;
  void copy_logprobs(const Segment* tail, int32_t start, float* out) const;
  static void set_logprobs(Segment* tail, int32_t start, int32_t stop, const float* values);
  static int32_t num_computed(const Segment* tail);

  // --- structure (segment_tree.cc) ---
  Segment* hang(Segment* parent, int32_t start, int32_t name);
  // Splits at start < position < end: a new head takes [start, position), `segment` keeps the rest.
  // The caller gives the head its second reference.
  Segment* split(Segment* segment, int32_t position);
  // Drops one reference; frees the segment and, up the chain, what nobody holds any more.
  void release(Segment* segment);
  // Merges `segment` into its child while that child is its only holder.
  void try_merge(Segment* segment);

  // --- growth (growth.cc) ---
  // Throws OutOfPagesError when `need` pages can't be had without the protected cached ones.
  void check_pages(int64_t need, int32_t protected_cached = 0) const;
  void take_pages(int32_t count, std::vector<int32_t>& pages, bool retain);
  // Returns the new tail (`tail` itself when written in place); throws OutOfPagesError unchanged.
  Segment* append(Segment* tail, const int32_t* tokens, const float* logprobs, int32_t count,
                  bool retain);
  // A new tail with one reference for these tokens; sets *num_cached.
  Segment* create(const int32_t* tokens, int32_t count, const std::string& name,
                  int32_t* num_cached);
  // The segment of the chain that ends at 1 <= position <= tail->end(), split if need be; the
  // caller adds a reference at once.
  Segment* segment_ending_at(Segment* tail, int32_t position);
  // After a rollback: a page that its sole owner will rewrite leaves the index.
  void unindex_partial_page(Segment* tail);

  // --- computing (growth.cc) ---
  void commit_items(std::vector<FlightItem> items);
  void cancel_items(std::vector<FlightItem> items);

  // Drops a reference that kept a page live.
  void drop_page(int32_t page);

  const int32_t page_size;
  int32_t shift = 0;
  PagePool pool;
  PrefixIndex index;
  std::vector<Segment*> all;
  std::unordered_map<int64_t, std::vector<FlightItem>> flights;  // by plan id
  Counters counters;
  int64_t next_segment_id = 1;
  int64_t num_released = 0;  // pages that stopped being live, ever

 private:
  void unlink(Segment* segment);
  void replace_child(Segment* parent, Segment* old_child, Segment* new_child);
  void destroy(Segment* segment);
  bool merge_into_child(Segment* parent, Segment* child);
  void settle(std::vector<FlightItem>& items);
  bool join_pages(Segment* parent, Segment* child);
  void index_page(Segment* segment, int32_t k);
};

}  // namespace dendrite
