// TreeCore: the thread-safe face of the control plane. It owns the branch handles, checks every
// argument before anything changes, and holds one mutex. No method touches Python: the bindings
// release the GIL around the long ones, so the mutex is never held by someone who waits for it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "plan.h"
#include "segment_tree.h"

namespace dendrite {

using Handle = int64_t;  // generation << 32 | slot

struct PageTables {
  std::vector<int32_t> indptr{0}, indices, last_page_len;
};

struct SegmentInfo {
  int64_t id;
  int32_t start, length, refs;
  std::vector<int32_t> pages;
};

struct BranchColumns {
  std::vector<int32_t> num_tokens, num_computed, pages, owned_pages, tail_refs, segments;
};

struct SegmentDump {
  int64_t id, parent;
  int32_t start, computed, refs, pending_src;
  std::string name;
  std::vector<int32_t> tokens, pages;
  std::vector<float> logprobs;
};

struct IndexDump {
  int32_t page, parent;
  std::string name;
  std::vector<int32_t> tokens;
  int64_t owner;
};

struct Dump {
  std::vector<SegmentDump> segments;                      // by id
  std::vector<std::pair<Handle, int64_t>> branches;       // handle, id of the tail; by handle
  std::vector<int64_t> free_handles;                      // generation << 32 | slot, a stack
  std::vector<int32_t> page_refs, free_list, retained, lru;
  std::vector<uint8_t> page_state;
  std::vector<IndexDump> index;                           // by page
  std::vector<std::vector<std::vector<int64_t>>> flights; // per plan (segment id, from, to), sorted
};

class TreeCore {
 public:
  TreeCore(int64_t num_pages, int64_t page_size, bool prefix_cache, bool debug);

  int32_t num_pages() const { return tree_.pool.num_pages(); }
  int32_t page_size() const { return tree_.page_size; }
  bool debug() const { return debug_; }

  std::pair<Handle, int32_t> create(const int32_t* tokens, size_t count, const std::string& name);
  Handle fork(Handle branch);
  std::vector<Handle> fork_many(Handle branch, int64_t count);
  Handle fork_at(Handle branch, int64_t position);
  void append(Handle branch, const int32_t* tokens, size_t count, const float* logprobs,
              bool retain);
  // `logprobs` and `expected` may be null.
  std::vector<uint8_t> append_batch(const Handle* branches, const int32_t* tokens,
                                    const float* logprobs, const int32_t* expected, size_t count);
  void set_logprobs(Handle branch, int64_t start, const float* values, size_t count);
  int64_t rollback(Handle branch, int64_t count);
  int64_t prune(Handle branch);

  // Guessed tokens behind a branch (drafts.cc). `prune` ends a draft that is not adopted.
  Handle draft(Handle branch, const int32_t* tokens, size_t count);
  // Status as in append_batch: 0 done, 2 stale, 3 changed.
  uint8_t adopt(Handle branch, Handle draft, int64_t keep, const float* logprobs, size_t count,
                int64_t expected);

  int32_t num_tokens(Handle branch) const;
  int32_t num_computed(Handle branch) const;
  std::vector<int32_t> tokens(Handle branch, int64_t start) const;
  std::vector<float> logprobs(Handle branch, int64_t start) const;
  std::vector<int32_t> pending(const Handle* branches, size_t count) const;

  // Returns the id under which commit or cancel closes the plan.
  int64_t plan(const Handle* branches, const int32_t* quotas, size_t count, PlanArrays& arrays);
  void commit(int64_t plan);
  void cancel(int64_t plan);  // no effect on a closed plan

  PageTables page_tables(const Handle* branches, size_t count) const;
  BranchColumns describe(const Handle* branches, size_t count) const;
  std::vector<SegmentInfo> segments(Handle branch) const;
  std::vector<int32_t> page_refs() const;
  std::vector<uint8_t> page_state() const;
  int64_t evict(int64_t count);
  std::vector<int32_t> peek_free(int64_t count) const;
  int32_t match_prefix(const int32_t* tokens, size_t count, const std::string& name) const;
  std::vector<std::pair<const char*, int64_t>> stats() const;
  std::map<int32_t, int32_t> refcount_histogram() const;
  void check_integrity() const;
  Dump dump() const;
  PageEvents debug_events();
  std::vector<int32_t> debug_unsealed();

 private:
  struct Slot {
    Segment* tail = nullptr;  // null: the slot is free
    uint32_t generation = 1;
    bool is_draft = false;
  };
  friend class IntegrityCheck;

  // --- all below expect the mutex to be held ---
  Slot& slot_of(Handle branch);
  Segment* tail_of(Handle branch) const;
  Segment* find_tail(Handle branch) const;  // null when stale
  std::vector<Segment*> tails_of(const Handle* branches, size_t count) const;
  Handle new_handle(Segment* tail);
  void retire(uint32_t slot);  // its handle is over; the caller has the tail's reference
  uint8_t page_state_of(int32_t page) const;
  std::vector<int32_t> count_holders() const;
  int32_t count_owned(Segment* tail) const;

  mutable std::mutex mutex_;
  SegmentTree tree_;
  const bool debug_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_slots_;
  int64_t next_plan_ = 1;
  mutable std::vector<int32_t> scratch_;  // [num_pages], all 0 between calls
};

// Throws InvalidArgumentError when a token id is negative.
void check_tokens(const int32_t* tokens, size_t count);

}  // namespace dendrite
