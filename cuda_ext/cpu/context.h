// What one engine keeps between kernel calls: the instruction set, the thread count and the scratch.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "kernels.h"
#include "schedule.h"

namespace dendrite {

// Grow-only memory aligned to cache lines; contents are not kept when it grows.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = size_t(count) * sizeof(T) + 64;
    if (bytes > size_) {
      data_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
      size_ = bytes;
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Release {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Release> data_;
  size_t size_ = 0;
};

struct ThreadScratch {
  Scratch attention, row, bucket, weight, ids;
};

// One call at a time: a lock guards the scratch, so a context may be shared by threads.
struct Context {
  // isa: "auto" (the best this machine has) or one of available_isas().
  explicit Context(const std::string& isa, int threads);
  void set_threads(int count);

  const KernelTable* kernels;
  int threads = 1;
  std::vector<ThreadScratch> scratch;  // [threads]
  Scratch partials;
  Scratch rotated;  // queries in the basis of packed pages
  Scratch counters;
  std::mutex lock;
};

// Names of the instruction sets that this build and machine can run, slowest first.
std::vector<std::string> available_isas();

struct AttentionCall {
  const float* q;        // [rows, heads, dim]
  const float* k_pages;  // [pages, kv_heads, dim, page_size]
  const float* v_pages;  // [pages, kv_heads, page_size, dim]
  float* out;            // [rows, heads, dim]
  int heads, kv_heads, dim;
  int64_t num_pages;
  float scale;
  const PackedSide* k_side = nullptr;  // packed pages instead of k_pages and v_pages
  const PackedSide* v_side = nullptr;
};
// Throws std::invalid_argument when the schedule was built for other sizes.
void tree_attention(Context& context, const Schedule& schedule, AttentionCall call);

}  // namespace dendrite
