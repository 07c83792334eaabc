// The pool of physical pages: reference counts, per-page flags and the free list.
#pragma once

#include <cstdint>
#include <vector>

namespace dendrite {

// Pages taken, freed and sealed (full and computed) since the last read. Debug mode only.
struct PageEvents {
  std::vector<int32_t> taken, freed, sealed;
};

// Invariant: a page is on the free list exactly when its refs are 0.
// refs = segments that list the page + pending copies that read it + 1 when it is in the index.
class PagePool {
 public:
  PagePool(int32_t num_pages, int32_t page_size, bool debug);

  int32_t num_pages() const { return num_pages_; }
  int32_t page_size() const { return page_size_; }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int64_t num_taken() const { return num_taken_; }
  const std::vector<int32_t>& free_list() const { return free_; }

  int32_t refs(int32_t page) const { return refs_[page]; }
  // References that keep the page live, i.e. all but the index entry.
  int32_t live_refs(int32_t page) const { return refs_[page] - indexed_[page]; }
  bool indexed(int32_t page) const { return indexed_[page] != 0; }
  bool retained(int32_t page) const { return retain_[page] != 0; }

  // Pops the free list (the caller has checked that it is not empty); the page has one reference.
  int32_t take();
  void ref(int32_t page) { ++refs_[page]; }
  // Returns the references left. A page that reaches 0 must be handed to put_back.
  int32_t unref(int32_t page) { return --refs_[page]; }
  void put_back(int32_t page);

  void retain(int32_t page) { retain_[page] = 1; }
  void set_indexed(int32_t page, bool value) { indexed_[page] = value ? 1 : 0; }
  void seal(int32_t page);
  void unseal(int32_t page);

  PageEvents drain_events();
  std::vector<int32_t> drain_unsealed();

 private:
  int32_t num_pages_, page_size_;
  bool debug_;
  int64_t num_taken_ = 0;
  std::vector<int32_t> refs_;
  std::vector<uint8_t> indexed_, retain_, sealed_;
  std::vector<int32_t> free_;  // a stack; the back is taken next
  PageEvents events_;
  std::vector<int32_t> unsealed_;  // sealed pages about to be rewritten after a rollback
};

}  // namespace dendrite
