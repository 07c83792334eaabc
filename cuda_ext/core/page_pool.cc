#include "page_pool.h"

#include <utility>

namespace dendrite {

PagePool::PagePool(int32_t num_pages, int32_t page_size, bool debug)
    : num_pages_(num_pages),
      page_size_(page_size),
      debug_(debug),
      refs_(num_pages, 0),
      indexed_(num_pages, 0),
      retain_(num_pages, 0),
      sealed_(num_pages, 0) {
  free_.reserve(num_pages);
  for (int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);
}

int32_t PagePool::take() {
  const int32_t page = free_.back();
  free_.pop_back();
  refs_[page] = 1;
  ++num_taken_;
  if (debug_) events_.taken.push_back(page);
  return page;
}

void PagePool::put_back(int32_t page) {
  retain_[page] = 0;
  sealed_[page] = 0;
  free_.push_back(page);
  if (debug_) events_.freed.push_back(page);
}

void PagePool::seal(int32_t page) {
  if (sealed_[page]) return;
  sealed_[page] = 1;
  if (debug_) events_.sealed.push_back(page);
}

void PagePool::unseal(int32_t page) {
  if (!sealed_[page]) return;
  sealed_[page] = 0;
  if (debug_) unsealed_.push_back(page);
}

PageEvents PagePool::drain_events() { return std::exchange(events_, PageEvents{}); }

std::vector<int32_t> PagePool::drain_unsealed() {
  return std::exchange(unsealed_, std::vector<int32_t>{});
}

}  // namespace dendrite
