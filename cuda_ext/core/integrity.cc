// Recounts the whole state from the handles and says where the books disagree.
#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "errors.h"
#include "tree_core.h"

namespace dendrite {

namespace {

std::string str(int64_t value) { return std::to_string(value); }

void expect(bool truth, const std::string& lie) {
  if (!truth) throw IntegrityFault(lie);
}

}  // namespace

class IntegrityCheck {
 public:
  explicit IntegrityCheck(const TreeCore& core)
      : core_(core), tree_(core.tree_), page_refs_(core.num_pages(), 0) {}

  void run() {
    count_holders();
    for (const Segment* s : tree_.all) check_segment(*s);
    check_flights();
    check_index();
    check_pages();
  }

 private:
  std::string name(const Segment& s) const { return "segment " + str(s.id); }

  void count_holders() {
    for (const Segment* s : tree_.all) known_.insert(s);
    for (const auto& slot : core_.slots_) {
      if (!slot.tail) continue;
      expect(known_.count(slot.tail), "a branch points at a segment that is gone");
      ++refs_[slot.tail];
    }
    for (uint32_t slot : core_.free_slots_) {
      expect(!core_.slots_[slot].tail, "handle slot " + str(slot) + " is free and in use");
    }
    for (const Segment* s : tree_.all) {
      if (!s->parent) continue;
      expect(known_.count(s->parent), name(*s) + " has a parent that is gone");
      ++refs_[s->parent];
      ++children_[s->parent];
    }
  }

  void check_segment(const Segment& s) {
    expect(s.refs == refs_[&s],
           name(s) + " counts " + str(s.refs) + " refs, recount " + str(refs_[&s]));
    expect(s.num_children == children_[&s], name(s) + " counts " + str(s.num_children) +
                                                " children, recount " + str(children_[&s]));
    expect(s.refs > 0, name(s) + " has no holder");
    expect(!s.tokens.empty(), name(s) + " is empty");
    expect(s.tokens.size() == s.logprobs.size(), name(s) + " has tokens without logprobs");
    const int32_t pages = tree_.ceil_page(s.end()) - tree_.floor_page(s.start);
    expect(static_cast<int32_t>(s.pages.size()) == pages,
           name(s) + " lists " + str(s.pages.size()) + " pages, needs " + str(pages));
    expect(s.computed >= s.start && s.computed <= s.end(),
           name(s) + " is computed to " + str(s.computed) + ", outside its tokens");
    const int32_t above = s.parent ? s.parent->end() : 0;
    expect(s.start == above, name(s) + " starts at " + str(s.start) + ", not at " + str(above));
    if (s.parent) {
      expect(s.name == s.parent->name, name(s) + " has another namespace than its parent");
      expect(s.computed == s.start || s.parent->computed == s.parent->end(),
             name(s) + " is computed below an uncomputed parent");
    }
    std::unordered_set<int32_t> once;
    for (int32_t page : s.pages) {
      expect(page >= 0 && page < core_.num_pages(), name(s) + " lists page " + str(page));
      expect(once.insert(page).second, name(s) + " lists page " + str(page) + " twice");
      ++page_refs_[page];
    }
    check_seam(s);
  }

  void check_seam(const Segment& s) {
    if (s.pending_src >= 0) {
      expect(s.parent && tree_.offset(s.start) != 0 && s.computed == s.start &&
                 s.pending_src == s.parent->pages.back() && s.pending_src != s.pages.front(),
             name(s) + " waits for an impossible copy from page " + str(s.pending_src));
      ++page_refs_[s.pending_src];
    }
    const bool alone = s.refs == 1 && s.num_children == 1;
    expect(!alone || s.first_child->pending_src >= 0,
           name(s) + " is held by a single child and was not merged");
  }

  void check_flights() {
    std::unordered_map<const Segment*, int32_t> counts;
    for (const auto& [id, items] : tree_.flights) {
      for (const FlightItem& item : items) {
        if (!item.segment) continue;
        expect(known_.count(item.segment), "a plan computes a segment that is gone");
        ++counts[item.segment];
        expect(item.from >= item.segment->start && item.to <= item.segment->end() &&
                   item.from < item.to,
               name(*item.segment) + " is in a plan for tokens it does not have");
      }
    }
    for (const Segment* s : tree_.all) {
      expect(s->in_flight == counts[s], name(*s) + " counts " + str(s->in_flight) +
                                            " plan items, recount " + str(counts[s]));
    }
  }

  void check_index() {
    if (!tree_.index.enabled()) return;
    std::vector<int32_t> children(core_.num_pages(), 0);
    int32_t cached = 0;
    for (int32_t page = 0; page < core_.num_pages(); ++page) {
      if (!tree_.pool.indexed(page)) continue;
      const IndexNode& node = tree_.index.node(page);
      const bool live = page_refs_[page] > 0;
      expect(live != node.cached, "page " + str(page) + (live ? " is live and marked cached"
                                                              : " is held by nobody, not cached"));
      if (node.parent >= 0) {
        expect(tree_.pool.indexed(node.parent), "page " + str(page) + " hangs below a page that "
                                                "is not in the index");
        ++children[node.parent];
        expect(!live || page_refs_[node.parent] > 0,
               "live page " + str(page) + " hangs below a cached one");
      }
      expect(tree_.index.find(node.name, node.parent, tree_.index.tokens(page)) == page,
             "page " + str(page) + " is not found under its own tokens");
      if (node.owner) check_owner(page, node);
      cached += node.cached;
      ++page_refs_[page];
    }
    expect(cached == tree_.index.num_cached(), "the index counts " +
                                                   str(tree_.index.num_cached()) +
                                                   " cached pages, recount " + str(cached));
    check_nodes(children);
    check_owners();
  }

  void check_nodes(const std::vector<int32_t>& children) {
    for (int32_t page = 0; page < core_.num_pages(); ++page) {
      if (!tree_.pool.indexed(page)) continue;
      const IndexNode& node = tree_.index.node(page);
      expect(node.num_children == children[page], "page " + str(page) + " counts " +
                                                      str(node.num_children) +
                                                      " pages below it in the index, recount " +
                                                      str(children[page]));
      expect(tree_.index.in_lru(page) == node.cached,
             "page " + str(page) + " is wrongly (not) offered for eviction");
      expect(node.parent < 0 || !tree_.index.node(node.parent).cached ||
                 node.tick < tree_.index.node(node.parent).tick,
             "page " + str(page) + " would be evicted after the page above it");
    }
  }

  void check_owner(int32_t page, const IndexNode& node) {
    const Segment* s = node.owner;
    expect(known_.count(s), "page " + str(page) + " is owned by a segment that is gone");
    auto at = std::find(s->pages.begin(), s->pages.end(), page);
    expect(at != s->pages.end(), name(*s) + " owns page " + str(page) + " and does not list it");
    const auto k = static_cast<int32_t>(at - s->pages.begin()) + tree_.floor_page(s->start);
    const int32_t stop = (k + 1) << tree_.shift;
    expect(stop <= s->computed, "page " + str(page) + " is in the index before it is computed");
    std::vector<int32_t> tokens(core_.page_size());
    tree_.copy_tokens(s, k << tree_.shift, stop, tokens.data());
    expect(std::equal(tokens.begin(), tokens.end(), tree_.index.tokens(page)),
           "page " + str(page) + " is in the index under tokens it does not hold");
    expect(node.parent == (k == 0 ? -1 : tree_.page_at(s, k - 1)),
           "page " + str(page) + " hangs below a page that is not the one before it");
    expect(node.name == s->name, "page " + str(page) + " is in another namespace's index");
  }

  // A whole page in a live segment must be known as such, or a hit would list it twice.
  void check_owners() {
    for (const Segment* s : tree_.all) {
      const int32_t base = tree_.floor_page(s->start);
      for (size_t i = 0; i < s->pages.size(); ++i) {
        const int32_t stop = (base + static_cast<int32_t>(i) + 1) << tree_.shift;
        if (stop > s->end() || !tree_.pool.indexed(s->pages[i])) continue;
        expect(tree_.index.node(s->pages[i]).owner == s,
               name(*s) + " holds page " + str(s->pages[i]) + " that the index does not give it");
      }
    }
  }

  void check_pages() {
    std::vector<uint8_t> on_free_list(core_.num_pages(), 0);
    for (int32_t page : tree_.pool.free_list()) {
      expect(page >= 0 && page < core_.num_pages() && !on_free_list[page],
             "page " + str(page) + " is on the free list twice");
      on_free_list[page] = 1;
    }
    int32_t live = 0;
    for (int32_t page = 0; page < core_.num_pages(); ++page) {
      expect(tree_.pool.refs(page) == page_refs_[page],
             "page " + str(page) + " counts " + str(tree_.pool.refs(page)) + " refs, recount " +
                 str(page_refs_[page]));
      expect((page_refs_[page] == 0) == (on_free_list[page] == 1),
             "page " + str(page) + " with " + str(page_refs_[page]) + " refs is " +
                 (on_free_list[page] ? "on" : "not on") + " the free list");
      expect(page_refs_[page] > 0 || !tree_.pool.retained(page),
             "free page " + str(page) + " is marked to be kept");
      live += core_.page_state_of(page) == 1;
    }
    const int32_t total = live + tree_.pool.num_free() + tree_.index.num_cached();
    expect(total == core_.num_pages(), str(tree_.pool.num_free()) + " free + " + str(live) +
                                           " live + " + str(tree_.index.num_cached()) +
                                           " cached pages are not " + str(core_.num_pages()));
  }

  const TreeCore& core_;
  const SegmentTree& tree_;
  std::vector<int32_t> page_refs_;
  std::unordered_set<const Segment*> known_;
  std::unordered_map<const Segment*, int32_t> refs_, children_;
};

void TreeCore::check_integrity() const {
  std::lock_guard<std::mutex> lock(mutex_);
  IntegrityCheck(*this).run();
}

}  // namespace dendrite
