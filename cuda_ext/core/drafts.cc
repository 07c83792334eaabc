// Drafts: tokens that somebody guessed, computed beside a branch without being part of it.
#include <limits>
#include <vector>

#include "errors.h"
#include "tree_core.h"

namespace dendrite {

using Lock = std::lock_guard<std::mutex>;

Handle TreeCore::draft(Handle branch, const int32_t* tokens, size_t count) {
  check_tokens(tokens, count);
  Lock lock(mutex_);
  Segment* tail = tail_of(branch);
  const int32_t held = tail->end();
  if (held < 2) {
    throw InvalidArgumentError("a draft needs a branch of at least 2 tokens, this one holds " +
                               std::to_string(held));
  }
  const auto limit = static_cast<size_t>(std::numeric_limits<int32_t>::max() - held);
  if (count < 1 || count > limit) {
    throw InvalidArgumentError("tokens has " + std::to_string(count) + " ids, need 1.." +
                               std::to_string(limit));
  }
  // The last token comes along: its K and V, computed in the same pass, belong into the draft's own
  // copy of the page. The cut leaves two holders behind, so appending takes a page of its own.
  const int32_t cut = held - 1;
  const int64_t last_page = (static_cast<int64_t>(held) + static_cast<int64_t>(count) +
                             tree_.page_size - 1) >> tree_.shift;
  tree_.check_pages(last_page - tree_.floor_page(cut));
  std::vector<int32_t> ids{0};
  std::vector<float> logprobs(count + 1, std::numeric_limits<float>::quiet_NaN());
  tree_.copy_tokens(tail, cut, held, ids.data());
  tree_.copy_logprobs(tail, cut, logprobs.data());
  ids.insert(ids.end(), tokens, tokens + count);
  Segment* head = tree_.segment_ending_at(tail, cut);
  ++head->refs;
  Segment* own = tree_.append(head, ids.data(), logprobs.data(), static_cast<int32_t>(ids.size()),
                              false);
  const Handle handle = new_handle(own);
  slots_[static_cast<uint32_t>(handle)].is_draft = true;
  return handle;
}

uint8_t TreeCore::adopt(Handle branch, Handle draft, int64_t keep, const float* logprobs,
                        size_t count, int64_t expected) {
  Lock lock(mutex_);
  Slot& from = slot_of(draft);
  if (!from.is_draft) {
    throw InvalidArgumentError("handle " + std::to_string(draft) + " is a branch, not a draft");
  }
  const int32_t total = from.tail->end();
  if (keep < 1 || keep > total || static_cast<int64_t>(count) > keep) {
    throw InvalidArgumentError("keep must be from 1 to " + std::to_string(total) +
                               " and at least the number of logprobs (" + std::to_string(count) +
                               "), got " + std::to_string(keep));
  }
  Segment* old_tail = find_tail(branch);
  if (!old_tail) return 2;
  if (old_tail->end() != expected) return 3;
  if (branch == draft) throw InvalidArgumentError("a draft can't adopt itself");

  Segment* tail = from.tail;
  if (keep < total) {
    Segment* target = tree_.segment_ending_at(tail, static_cast<int32_t>(keep));
    ++target->refs;
    tree_.release(tail);
    tail = target;
  }
  retire(static_cast<uint32_t>(draft));
  slots_[static_cast<uint32_t>(branch)].tail = tail;
  Segment* segment = tail;
  for (int64_t position = keep - 1; count > 0; --position) {
    while (segment->start > position) segment = segment->parent;
    segment->logprobs[position - segment->start] = logprobs[--count];
  }
  tree_.release(old_tail);
  tree_.unindex_partial_page(tail);
  return 0;
}

}  // namespace dendrite
