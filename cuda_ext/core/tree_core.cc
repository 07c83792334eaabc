#include "tree_core.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "errors.h"

namespace dendrite {

namespace {

using Lock = std::lock_guard<std::mutex>;

constexpr int64_t kMaxForks = 1 << 20;

int32_t checked_num_pages(int64_t num_pages, int64_t page_size) {
  if (page_size < 1 || page_size > 256 || !std::has_single_bit(static_cast<uint64_t>(page_size))) {
    throw InvalidArgumentError("page_size must be a power of two from 1 to 256, got " +
                               std::to_string(page_size));
  }
  const int64_t most = std::numeric_limits<int32_t>::max() / page_size;
  if (num_pages < 1 || num_pages > most) {
    throw InvalidArgumentError("num_pages must be from 1 to " + std::to_string(most) +
                               " with page_size " + std::to_string(page_size) + ", got " +
                               std::to_string(num_pages));
  }
  return static_cast<int32_t>(num_pages);
}

[[noreturn]] void throw_stale(Handle branch) {
  throw StaleBranchError("branch handle " + std::to_string(branch) +
                         " is stale: it was pruned, or belongs to another engine");
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high, const char* why) {
  if (value >= low && value <= high) return;
  throw InvalidArgumentError(std::string(name) + " must be from " + std::to_string(low) + " to " +
                             std::to_string(high) + " (" + why + "), got " + std::to_string(value));
}

}  // namespace

void check_tokens(const int32_t* tokens, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0) {
      throw InvalidArgumentError("tokens[" + std::to_string(i) + "] is negative: " +
                                 std::to_string(tokens[i]));
    }
  }
}

TreeCore::TreeCore(int64_t num_pages, int64_t page_size, bool prefix_cache, bool debug)
    : tree_(checked_num_pages(num_pages, page_size), static_cast<int32_t>(page_size), prefix_cache,
            debug),
      debug_(debug),
      scratch_(tree_.pool.num_pages(), 0) {}

Segment* TreeCore::find_tail(Handle branch) const {
  const auto slot = static_cast<uint32_t>(branch);
  if (slot >= slots_.size()) return nullptr;
  return slots_[slot].generation == static_cast<uint64_t>(branch) >> 32 ? slots_[slot].tail
                                                                        : nullptr;
}

Segment* TreeCore::tail_of(Handle branch) const {
  Segment* tail = find_tail(branch);
  if (!tail) throw_stale(branch);
  return tail;
}

TreeCore::Slot& TreeCore::slot_of(Handle branch) {
  tail_of(branch);
  return slots_[static_cast<uint32_t>(branch)];
}

std::vector<Segment*> TreeCore::tails_of(const Handle* branches, size_t count) const {
  std::vector<Segment*> tails;
  tails.reserve(count);
  for (size_t i = 0; i < count; ++i) tails.push_back(tail_of(branches[i]));
  return tails;
}

Handle TreeCore::new_handle(Segment* tail) {
  uint32_t slot = static_cast<uint32_t>(slots_.size());
  if (free_slots_.empty()) {
    slots_.emplace_back();
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
  }
  slots_[slot].tail = tail;
  return static_cast<Handle>(slots_[slot].generation) << 32 | slot;
}

void TreeCore::retire(uint32_t slot) {
  slots_[slot].tail = nullptr;
  slots_[slot].is_draft = false;
  // A slot whose generations are used up stays unused: a handle is never valid again.
  if (++slots_[slot].generation < 0x7fffffffu) free_slots_.push_back(slot);
}

std::pair<Handle, int32_t> TreeCore::create(const int32_t* tokens, size_t count,
                                            const std::string& name) {
  if (count == 0) throw EmptyPromptError("tokens is empty: a prompt has at least one token");
  check_tokens(tokens, count);
  if (count > std::numeric_limits<int32_t>::max()) {
    throw InvalidArgumentError("tokens has " + std::to_string(count) + " ids, too many");
  }
  Lock lock(mutex_);
  int32_t num_cached = 0;
  Segment* tail = tree_.create(tokens, static_cast<int32_t>(count), name, &num_cached);
  return {new_handle(tail), num_cached};
}

Handle TreeCore::fork(Handle branch) {
  Lock lock(mutex_);
  Segment* tail = tail_of(branch);
  ++tail->refs;
  ++tree_.counters.forks;
  return new_handle(tail);
}

std::vector<Handle> TreeCore::fork_many(Handle branch, int64_t count) {
  Lock lock(mutex_);
  Segment* tail = tail_of(branch);
  check_range("n", count, 1, kMaxForks, "branches to make");
  std::vector<Handle> handles;
  handles.reserve(count);
  for (int64_t i = 0; i < count; ++i) handles.push_back(new_handle(tail));
  tail->refs += static_cast<int32_t>(count);
  tree_.counters.forks += count;
  return handles;
}

Handle TreeCore::fork_at(Handle branch, int64_t position) {
  Lock lock(mutex_);
  Segment* tail = tail_of(branch);
  check_range("position", position, 1, tail->end(), "tokens of the branch");
  Segment* target = tree_.segment_ending_at(tail, static_cast<int32_t>(position));
  ++target->refs;
  ++tree_.counters.forks;
  return new_handle(target);
}

void TreeCore::append(Handle branch, const int32_t* tokens, size_t count, const float* logprobs,
                      bool retain) {
  check_tokens(tokens, count);
  if (count > std::numeric_limits<int32_t>::max()) {
    throw InvalidArgumentError("tokens has " + std::to_string(count) + " ids, too many");
  }
  Lock lock(mutex_);
  Slot& slot = slot_of(branch);
  slot.tail = tree_.append(slot.tail, tokens, logprobs, static_cast<int32_t>(count), retain);
}

std::vector<uint8_t> TreeCore::append_batch(const Handle* branches, const int32_t* tokens,
                                            const float* logprobs, const int32_t* expected,
                                            size_t count) {
  check_tokens(tokens, count);
  std::vector<uint8_t> status(count, 0);
  Lock lock(mutex_);
  for (size_t i = 0; i < count; ++i) {
    Segment* tail = find_tail(branches[i]);
    if (!tail) {
      status[i] = 2;
      continue;
    }
    if (expected && tail->end() != expected[i]) {
      status[i] = 3;
      continue;
    }
    try {
      slots_[static_cast<uint32_t>(branches[i])].tail =
          tree_.append(tail, tokens + i, logprobs ? logprobs + i : nullptr, 1, false);
    } catch (const OutOfPagesError&) {
      status[i] = 1;
    }
  }
  return status;
}

int64_t TreeCore::rollback(Handle branch, int64_t count) {
  Lock lock(mutex_);
  Slot& slot = slot_of(branch);
  const int32_t total = slot.tail->end();
  check_range("n", count, 1, total - 1, "tokens to drop; at least one stays");
  const int64_t before = tree_.num_released;
  Segment* target = tree_.segment_ending_at(slot.tail, total - static_cast<int32_t>(count));
  ++target->refs;
  Segment* old_tail = std::exchange(slot.tail, target);
  tree_.release(old_tail);
  tree_.unindex_partial_page(target);
  ++tree_.counters.rollbacks;
  return tree_.num_released - before;
}

int64_t TreeCore::prune(Handle branch) {
  Lock lock(mutex_);
  const Slot slot = slot_of(branch);
  const int64_t before = tree_.num_released;
  retire(static_cast<uint32_t>(branch));
  tree_.release(slot.tail);
  tree_.counters.prunes += !slot.is_draft;
  return tree_.num_released - before;
}

int32_t TreeCore::num_tokens(Handle branch) const {
  Lock lock(mutex_);
  return tail_of(branch)->end();
}

int32_t TreeCore::num_computed(Handle branch) const {
  Lock lock(mutex_);
  return SegmentTree::num_computed(tail_of(branch));
}

std::vector<int32_t> TreeCore::tokens(Handle branch, int64_t start) const {
  Lock lock(mutex_);
  const Segment* tail = tail_of(branch);
  check_range("start", start, 0, tail->end(), "tokens of the branch");
  std::vector<int32_t> out(tail->end() - start);
  tree_.copy_tokens(tail, static_cast<int32_t>(start), tail->end(), out.data());
  return out;
}

std::vector<float> TreeCore::logprobs(Handle branch, int64_t start) const {
  Lock lock(mutex_);
  const Segment* tail = tail_of(branch);
  check_range("start", start, 0, tail->end(), "tokens of the branch");
  std::vector<float> out(tail->end() - start);
  tree_.copy_logprobs(tail, static_cast<int32_t>(start), out.data());
  return out;
}

void TreeCore::set_logprobs(Handle branch, int64_t start, const float* values, size_t count) {
  Lock lock(mutex_);
  Segment* tail = tail_of(branch);
  check_range("start", start, 0, tail->end() - static_cast<int64_t>(count),
              "tokens of the branch less those given");
  const auto from = static_cast<int32_t>(start);
  SegmentTree::set_logprobs(tail, from, from + static_cast<int32_t>(count), values);
}

std::vector<int32_t> TreeCore::pending(const Handle* branches, size_t count) const {
  std::vector<int32_t> out(count, -1);
  Lock lock(mutex_);
  for (size_t i = 0; i < count; ++i) {
    const Segment* tail = find_tail(branches[i]);
    if (tail) out[i] = tail->end() - SegmentTree::num_computed(tail);
  }
  return out;
}

int64_t TreeCore::plan(const Handle* branches, const int32_t* quotas, size_t count,
                       PlanArrays& arrays) {
  for (size_t i = 0; i < count; ++i) {
    if (quotas[i] < 1) {
      throw InvalidArgumentError("quotas[" + std::to_string(i) + "] must be at least 1, got " +
                                 std::to_string(quotas[i]));
    }
  }
  Lock lock(mutex_);
  const std::vector<Segment*> tails = tails_of(branches, count);
  const int64_t id = next_plan_++;
  std::vector<FlightItem> items = build_plan(tree_, tails, quotas, id, arrays);
  for (const FlightItem& item : items) ++item.segment->in_flight;
  tree_.flights.emplace(id, std::move(items));
  return id;
}

void TreeCore::commit(int64_t plan) {
  Lock lock(mutex_);
  auto flight = tree_.flights.extract(plan);
  if (flight.empty()) {
    throw InvalidArgumentError("plan was already committed or cancelled; make a new one");
  }
  tree_.commit_items(std::move(flight.mapped()));
}

void TreeCore::cancel(int64_t plan) {
  Lock lock(mutex_);
  auto flight = tree_.flights.extract(plan);
  if (!flight.empty()) tree_.cancel_items(std::move(flight.mapped()));
}

int64_t TreeCore::evict(int64_t count) {
  Lock lock(mutex_);
  if (count < 0) {
    throw InvalidArgumentError("n must be at least 0 (pages to evict), got " +
                               std::to_string(count));
  }
  int64_t done = 0;
  for (; done < count && tree_.index.num_cached() > 0; ++done) tree_.index.evict_one();
  return done;
}

std::vector<int32_t> TreeCore::peek_free(int64_t count) const {
  Lock lock(mutex_);
  if (count < 0) {
    throw InvalidArgumentError("n must be at least 0 (free pages), got " + std::to_string(count));
  }
  const std::vector<int32_t>& free = tree_.pool.free_list();
  const auto most = static_cast<int64_t>(free.size());
  return {free.rbegin(), free.rbegin() + std::min(count, most)};
}

int32_t TreeCore::match_prefix(const int32_t* tokens, size_t count,
                               const std::string& name) const {
  check_tokens(tokens, count);
  if (count == 0) return 0;
  Lock lock(mutex_);
  const auto most = static_cast<int32_t>((count - 1) >> tree_.shift);
  const auto path = tree_.index.match(tree_.index.names().find(name), tokens, most);
  return static_cast<int32_t>(path.size()) << tree_.shift;
}

PageEvents TreeCore::debug_events() {
  Lock lock(mutex_);
  if (!debug_) throw InvalidArgumentError("debug_events needs TreeCore(debug=True)");
  return tree_.pool.drain_events();
}

std::vector<int32_t> TreeCore::debug_unsealed() {
  Lock lock(mutex_);
  if (!debug_) throw InvalidArgumentError("debug_unsealed needs TreeCore(debug=True)");
  return tree_.pool.drain_unsealed();
}

}  // namespace dendrite
