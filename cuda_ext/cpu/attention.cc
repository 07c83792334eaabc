// Drives the attention kernels over blocks, kv heads and chunks, and merges the chunk partials.
//
// Two orders of work with the same arithmetic: "whole" units (block, kv head) walk their chunks one
// after another; "split" units (block, kv head, chunk) run in parallel and the thread that finishes a
// block's last chunk merges them. Both merge in chunk order, so the results are the same bits.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "context.h"
#include "team.h"

namespace dendrite {
namespace {

constexpr int64_t kMaxPartialFloats = int64_t(64) << 18;  // 64 MiB of split partials
constexpr int64_t kSerialFloats = 1 << 14;  // of q that one thread rotates sooner
constexpr int64_t kSerialWork = 1 << 18;  // query-key multiply-adds that one thread does sooner

// One thread's buffers for a block, cut from one allocation.
struct BlockBuffers {
  float *q, *scores, *acc, *m, *l, *run_acc, *run_m, *run_l;
  int32_t *lo, *hi;
  int q_stride;

  BlockBuffers(Scratch& scratch, int max_q, int dim) {
    q_stride = ((max_q + 15) / 16 | 1) * 16;  // an odd number of cache lines: spreads over sets
    const int64_t n = q_stride, rows = n * dim;
    float* p = scratch.get<float>(3 * rows + n * kScoreStride + 6 * n);
    q = p;
    acc = q + rows;
    run_acc = acc + rows;
    scores = run_acc + rows;
    m = scores + n * kScoreStride;
    l = m + n;
    run_m = l + n;
    run_l = run_m + n;
    lo = reinterpret_cast<int32_t*>(run_l + n);
    hi = lo + n;
  }
};

class Attention {
 public:
  Attention(Context& context, const Schedule& schedule, const AttentionCall& call)
      : context_(context), s_(schedule), c_(call) {
    max_q_ = s_.rows_per_block * s_.group;
  }

  void run() {
    const int64_t whole = s_.num_blocks() * c_.kv_heads;
    const int64_t floats = s_.num_partials() * c_.heads * (c_.dim + 2);
    int threads = context_.threads;
    if (s_.work * c_.heads * c_.dim < kSerialWork) threads = 1;
    if (threads == 1 || whole >= 4 * threads || floats > kMaxPartialFloats)
      run_whole(threads);
    else
      run_split(threads, floats);
  }

 private:
  int64_t block_begin(int64_t b) const { return b * s_.rows_per_block; }
  int64_t block_end(int64_t b) const {
    return std::min(s_.num_rows(), block_begin(b) + s_.rows_per_block);
  }

  // Queries of a block, scaled and transposed to [dim, q_stride].
  void pack_queries(int64_t block, int kv_head, const BlockBuffers& buffers) const {
    int x = 0;
    for (int64_t r = block_begin(block); r < block_end(block); ++r)
      for (int g = 0; g < s_.group; ++g, ++x) {
        const float* q = c_.q + (r * c_.heads + int64_t(kv_head) * s_.group + g) * c_.dim;
        for (int d = 0; d < c_.dim; ++d) buffers.q[d * buffers.q_stride + x] = q[d] * c_.scale;
      }
  }

  // Visible columns of every q-row in one chunk.
  void visible_columns(int64_t block, int chunk, const BlockBuffers& buffers) const {
    int x = 0;
    for (int64_t r = block_begin(block); r < block_end(block); ++r) {
      const int position = s_.positions[r], base = chunk * kChunk;
      const int low = s_.window > 0 ? std::max(0, position - s_.window + 1 - base) : 0;
      const int high = std::min(kChunk, position + 1 - base);
      for (int g = 0; g < s_.group; ++g, ++x) {
        buffers.lo[x] = low;
        buffers.hi[x] = high;
      }
    }
  }

  void attend(int64_t cell, int kv_head, const BlockBuffers& buffers) const {
    const int64_t block = s_.cell_block[cell];
    visible_columns(block, s_.cell_chunk[cell], buffers);
    ChunkJob job{};
    job.k_side = c_.k_side;
    job.v_side = c_.v_side;
    job.kv_head = kv_head;
    const int64_t head_floats = int64_t(c_.dim) * s_.page_size;
    if (c_.k_side == nullptr) {
      job.k = c_.k_pages + kv_head * head_floats;
      job.v = c_.v_pages + kv_head * head_floats;
    }
    job.page_stride = head_floats * c_.kv_heads;
    job.pages = s_.pages.data();
    job.runs = s_.runs.data() + s_.run_indptr[cell];
    job.num_runs = int(s_.run_indptr[cell + 1] - s_.run_indptr[cell]);
    job.group = s_.group;
    job.dim = c_.dim;
    job.page_size = s_.page_size;
    job.page_shift = s_.page_shift;
    job.num_q = int(block_end(block) - block_begin(block)) * s_.group;
    job.q = buffers.q;
    job.q_stride = buffers.q_stride;
    job.lo = buffers.lo;
    job.hi = buffers.hi;
    job.scores = buffers.scores;
    job.acc = buffers.acc;
    job.m = buffers.m;
    job.l = buffers.l;
    if (c_.k_side == nullptr)
      context_.kernels->attend_chunk(job);
    else
      context_.kernels->attend_packed_chunk(job);
  }

  // The last step of a row's head: out = acc / l, in the basis of the model.
  void finish(const float* acc, float l, int64_t row, int kv_head, int g) const {
    float* out = c_.out + (row * c_.heads + int64_t(kv_head) * s_.group + g) * c_.dim;
    context_.kernels->finish_row(acc, l, out, c_.dim);
    if (c_.v_side != nullptr && c_.v_side->signs != nullptr)
      context_.kernels->rotate(out, c_.v_side->signs + int64_t(kv_head) * c_.dim, c_.dim, true, out);
  }

  void run_whole(int threads) {
    const int64_t units = s_.num_blocks() * c_.kv_heads;
    parallel_units(threads, units, [&](int64_t unit, int thread) {
      // Later blocks see more tokens: hand them out first.
      const int64_t block = s_.num_blocks() - 1 - unit / c_.kv_heads;
      BlockBuffers buffers(context_.scratch[thread].attention, max_q_, c_.dim);
      whole_block(block, int(unit % c_.kv_heads), buffers);
    });
  }

  void whole_block(int64_t block, int kv_head, BlockBuffers& buffers) {
    pack_queries(block, kv_head, buffers);
    for (int i = 0; i < s_.block_count[block]; ++i) {
      const int64_t cell = s_.block_cell[block] + i;
      attend(cell, kv_head, buffers);
      merge_block(block, s_.cell_chunk[cell], buffers);
    }
    int x = 0;
    for (int64_t r = block_begin(block); r < block_end(block); ++r)
      for (int g = 0; g < s_.group; ++g, ++x)
        finish(buffers.run_acc + int64_t(x) * c_.dim, buffers.run_l[x], r, kv_head, g);
  }

  void merge_block(int64_t block, int chunk, BlockBuffers& buffers) {
    int x = 0;
    for (int64_t r = block_begin(block); r < block_end(block); ++r)
      for (int g = 0; g < s_.group; ++g, ++x) {
        if (buffers.lo[x] >= buffers.hi[x]) continue;
        float* acc = buffers.run_acc + int64_t(x) * c_.dim;
        const float* part = buffers.acc + int64_t(x) * c_.dim;
        if (chunk == s_.first_chunk(r)) {
          std::memcpy(acc, part, sizeof(float) * c_.dim);
          buffers.run_m[x] = buffers.m[x];
          buffers.run_l[x] = buffers.l[x];
        } else {
          context_.kernels->merge_state(acc, buffers.run_m + x, buffers.run_l + x, part,
                                        buffers.m[x], buffers.l[x], c_.dim);
        }
      }
  }

  // partials: [row partial, heads, dim + 2], the last two being m and l.
  float* partial(int64_t row, int chunk, int head) const {
    const int64_t index = s_.row_partial[row] + chunk - s_.first_chunk(row);
    return partials_ + (index * c_.heads + head) * (c_.dim + 2);
  }

  void run_split(int threads, int64_t floats) {
    partials_ = context_.partials.get<float>(floats);
    const int64_t whole = s_.num_blocks() * c_.kv_heads;
    auto* left = context_.counters.get<std::atomic<int32_t>>(whole);
    for (int64_t i = 0; i < whole; ++i)
      new (left + i) std::atomic<int32_t>(s_.block_count[i / c_.kv_heads]);
    parallel_units(threads, s_.num_cells() * c_.kv_heads, [&](int64_t unit, int thread) {
      const int64_t cell = unit / c_.kv_heads, block = s_.cell_block[cell];
      const int kv_head = int(unit % c_.kv_heads);
      BlockBuffers buffers(context_.scratch[thread].attention, max_q_, c_.dim);
      pack_queries(block, kv_head, buffers);
      attend(cell, kv_head, buffers);
      keep_partials(block, s_.cell_chunk[cell], kv_head, buffers);
      if (left[block * c_.kv_heads + kv_head].fetch_sub(1, std::memory_order_acq_rel) == 1)
        merge_partials(block, kv_head);
    });
  }

  void keep_partials(int64_t block, int chunk, int kv_head, const BlockBuffers& buffers) const {
    int x = 0;
    for (int64_t r = block_begin(block); r < block_end(block); ++r)
      for (int g = 0; g < s_.group; ++g, ++x) {
        if (buffers.lo[x] >= buffers.hi[x]) continue;
        float* out = partial(r, chunk, kv_head * s_.group + g);
        std::memcpy(out, buffers.acc + int64_t(x) * c_.dim, sizeof(float) * c_.dim);
        out[c_.dim] = buffers.m[x];
        out[c_.dim + 1] = buffers.l[x];
      }
  }

  void merge_partials(int64_t block, int kv_head) const {
    for (int64_t r = block_begin(block); r < block_end(block); ++r)
      for (int g = 0; g < s_.group; ++g) {
        const int head = kv_head * s_.group + g, dim = c_.dim;
        float* acc = partial(r, s_.first_chunk(r), head);
        for (int chunk = s_.first_chunk(r) + 1; chunk <= s_.last_chunk(r); ++chunk) {
          const float* part = partial(r, chunk, head);
          context_.kernels->merge_state(acc, acc + dim, acc + dim + 1, part, part[dim],
                                        part[dim + 1], dim);
        }
        finish(acc, acc[dim + 1], r, kv_head, g);
      }
  }

  Context& context_;
  const Schedule& s_;
  const AttentionCall& c_;
  int max_q_;
  float* partials_ = nullptr;
};

// q in the basis of the K codes, once per row and head.
const float* rotated_queries(Context& context, const Schedule& schedule, const AttentionCall& call) {
  const int64_t rows = schedule.num_rows(), width = int64_t(call.heads) * call.dim;
  float* rotated = context.rotated.get<float>(rows * width);
  const int threads = rows * width < kSerialFloats ? 1 : context.threads;
  parallel_rows(threads, rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * call.heads; i < end * call.heads; ++i) {
      const int64_t kv_head = i % call.heads / schedule.group;
      context.kernels->rotate(call.q + i * call.dim, call.k_side->signs + kv_head * call.dim,
                              call.dim, false, rotated + i * call.dim);
    }
  });
  return rotated;
}

}  // namespace

void tree_attention(Context& context, const Schedule& schedule, AttentionCall call) {
  if (call.heads != call.kv_heads * schedule.group)
    throw std::invalid_argument("q has " + std::to_string(call.heads) + " heads, k_pages " +
                                std::to_string(call.kv_heads) + ": not a group of " +
                                std::to_string(schedule.group));
  if (call.dim < 8 || call.dim % 8 != 0)
    throw std::invalid_argument("head_dim must be a positive multiple of 8, got " +
                                std::to_string(call.dim));
  if (schedule.max_page >= call.num_pages)
    throw std::invalid_argument("plan: page index " + std::to_string(schedule.max_page) +
                                " is outside the " + std::to_string(call.num_pages) + " pages");
  const std::lock_guard<std::mutex> guard(context.lock);
  if (call.k_side != nullptr && call.k_side->signs != nullptr)
    call.q = rotated_queries(context, schedule, call);
  Attention(context, schedule, call).run();
}

}  // namespace dendrite
