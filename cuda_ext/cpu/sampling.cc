// Samples without sorting the vocabulary. Tokens are ordered by (processed logit descending, id
// ascending) and fall into kBuckets buckets of equal width below the maximum; the buckets are in
// that order too. Every filter keeps a prefix of the order, so a filter is one `Cut`: all tokens of
// the buckets before `bucket` and the first `count` of that bucket's sorted tokens. Only buckets in
// which a cut or the sampled point falls are ever sorted. Sums run in double, in a fixed order.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "team.h"

namespace dendrite {
namespace {

struct Cut {
  int bucket;   // kBuckets: everything
  int count;    // tokens kept of that bucket
  double mass;  // weight of all kept tokens
};

class RowSampler {
 public:
  RowSampler(const KernelTable& kernels, ThreadScratch& scratch, int vocab)
      : kernels_(kernels), scratch_(scratch), vocab_(vocab) {}

  // Draws from softmax(x / temperature) after top-k, top-p and min-p. `stats` is of x, max finite.
  int32_t draw(const float* x, const RowStats& stats, float temperature, int top_k, float top_p,
               float min_p, double uniform) {
    x_ = x;
    fill_buckets(stats, temperature);
    Cut cut = all();
    if (top_k > 0 && top_k < cut_tokens_) cut = keep_most_likely(top_k);
    if (top_p < 1.0f) cut = keep_mass(cut, double(top_p) * cut.mass);
    if (min_p > 0.0f) cut = keep_near_max(cut, min_p);
    return locate(cut, uniform * cut.mass);
  }

 private:
  void fill_buckets(const RowStats& stats, float temperature) {
    inverse_ = 1.0f / temperature;
    max_ = stats.max;
    // 64 nats below the maximum a token weighs e^-64: the last bucket may hold all of those.
    const float range = std::min(64.0f, (stats.max - stats.min) * inverse_);
    scale_ = range > 0.0f ? std::min(float(kBuckets - 1) / range, 1e30f) : 0.0f;
    bucket_ = scratch_.bucket.get<uint16_t>(vocab_);
    weight_ = scratch_.weight.get<float>(vocab_);
    ids_ = scratch_.ids.get<int32_t>(vocab_);
    kernels_.bucketize(x_, vocab_, max_, inverse_, scale_, bucket_, weight_);
    std::fill(counts_, counts_ + kBuckets + 1, 0);
    std::fill(mass_, mass_ + kBuckets + 1, 0.0);
    for (int i = 0; i < vocab_; ++i) {
      ++counts_[bucket_[i]];
      mass_[bucket_[i]] += double(weight_[i]);
    }
    cut_tokens_ = vocab_ - counts_[kBuckets];
    sorted_bucket_ = -1;
  }

  Cut all() const {
    double mass = 0.0;
    for (int b = 0; b < kBuckets; ++b) mass += mass_[b];
    return {kBuckets, 0, mass};
  }

  // Leaves the tokens of a bucket in ids_, in sampling order.
  int sort_bucket(int b) {
    if (sorted_bucket_ == b) return counts_[b];
    const int n = kernels_.find_bucket(bucket_, vocab_, uint16_t(b), ids_);
    const float* x = x_;
    const auto before = [x](int32_t i, int32_t j) { return x[i] != x[j] ? x[i] > x[j] : i < j; };
    if (!std::is_sorted(ids_, ids_ + n, before)) std::sort(ids_, ids_ + n, before);
    sorted_bucket_ = b;
    return n;
  }

  Cut keep_most_likely(int k) {
    double mass = 0.0;
    int b = 0, left = k;
    for (; counts_[b] < left; ++b) {
      left -= counts_[b];
      mass += mass_[b];
    }
    sort_bucket(b);
    for (int i = 0; i < left; ++i) mass += double(weight_[ids_[i]]);
    return {b, left, mass};
  }

  // The shortest prefix of `cut` whose mass reaches `wanted` (at least one token).
  Cut keep_mass(const Cut& cut, double wanted) {
    double mass = 0.0;
    int b = 0;
    while (b < cut.bucket && (counts_[b] == 0 || mass + mass_[b] < wanted)) mass += mass_[b++];
    if (b >= kBuckets) return cut;
    sort_bucket(b);
    const int n = b == cut.bucket ? cut.count : counts_[b];
    int kept = 0;
    while (kept < n) {
      mass += double(weight_[ids_[kept++]]);
      if (mass >= wanted) break;
    }
    return {b, kept, mass};
  }

  // The prefix of `cut` whose probability is at least min_p times the largest.
  Cut keep_near_max(const Cut& cut, float min_p) {
    const float distance = -std::log(std::min(min_p, 1.0f));
    const int limit = int(std::min(distance * scale_, float(kBuckets - 1)));
    if (limit > cut.bucket) return cut;
    double mass = 0.0;
    for (int b = 0; b < limit; ++b) mass += mass_[b];
    sort_bucket(limit);
    const int n = limit == cut.bucket ? cut.count : counts_[limit];
    int kept = 0;
    for (; kept < n && (max_ - x_[ids_[kept]]) * inverse_ <= distance; ++kept)
      mass += double(weight_[ids_[kept]]);
    return {limit, kept, mass};
  }

  // First token of `cut` at which the running mass passes `target`; the last one if none does.
  int32_t locate(const Cut& cut, double target) {
    double mass = 0.0;
    int last = -1;
    for (int b = 0; b <= cut.bucket && b < kBuckets; ++b) {
      const int n = b == cut.bucket ? cut.count : counts_[b];
      if (n == 0) continue;
      last = b;
      if (b < cut.bucket && mass + mass_[b] <= target) {
        mass += mass_[b];
        continue;
      }
      sort_bucket(b);
      for (int i = 0; i < n; ++i) {
        mass += double(weight_[ids_[i]]);
        if (mass > target) return ids_[i];
      }
    }
    sort_bucket(last);
    return ids_[(last == cut.bucket ? cut.count : counts_[last]) - 1];
  }

  const KernelTable& kernels_;
  ThreadScratch& scratch_;
  const int vocab_;
  const float* x_ = nullptr;
  uint16_t* bucket_ = nullptr;
  float* weight_ = nullptr;
  int32_t* ids_ = nullptr;
  float max_ = 0.0f, inverse_ = 1.0f, scale_ = 1.0f;
  int cut_tokens_ = 0, sorted_bucket_ = -1;
  int32_t counts_[kBuckets + 1];
  double mass_[kBuckets + 1];
};

bool has_penalty(const SamplingArrays& a, int64_t row) {
  return a.pen_indptr[row + 1] > a.pen_indptr[row] &&
         (a.repetition[row] != 1.0f || a.presence[row] != 0.0f || a.frequency[row] != 0.0f);
}

bool is_processed(const SamplingArrays& a, int64_t row) {
  return a.mask != nullptr || a.bias_indptr[row + 1] > a.bias_indptr[row] || has_penalty(a, row);
}

// Copies a row and applies, in order: bias, repetition, presence and frequency, bitmask.
void process_row(const SamplingArrays& a, int64_t row, const float* logits, int vocab, float* x) {
  std::memcpy(x, logits, sizeof(float) * vocab);
  for (int32_t i = a.bias_indptr[row]; i < a.bias_indptr[row + 1]; ++i)
    x[a.bias_ids[i]] += a.bias_values[i];
  if (has_penalty(a, row)) {
    for (int32_t i = a.pen_indptr[row]; i < a.pen_indptr[row + 1]; ++i) {
      float& value = x[a.pen_ids[i]];
      value = value > 0.0f ? value / a.repetition[row] : value * a.repetition[row];
      const int32_t count = a.pen_counts[i];
      value -= (count > 0 ? a.presence[row] : 0.0f) + a.frequency[row] * float(count);
    }
  }
  if (a.mask == nullptr) return;
  const int words = (vocab + 31) / 32;
  const int32_t* mask = a.mask + row * words;
  for (int w = 0; w < words; ++w) {
    const uint32_t bits = uint32_t(mask[w]);
    if (bits == 0xffffffffu) continue;
    const int end = std::min(vocab, 32 * (w + 1));
    for (int i = 32 * w; i < end; ++i)
      if ((bits >> (i & 31) & 1u) == 0) x[i] = -std::numeric_limits<float>::infinity();
  }
}

void check_ids(const char* name, const int32_t* indptr, const int32_t* ids, int64_t rows, int vocab) {
  for (int32_t i = indptr[0]; i < indptr[rows]; ++i)
    if (ids[i] < 0 || ids[i] >= vocab)
      throw std::invalid_argument(std::string(name) + ": token id " + std::to_string(ids[i]) +
                                  " is outside the vocabulary of " + std::to_string(vocab));
}

float log_softmax(const KernelTable& kernels, const float* x, int vocab, float max, float value) {
  return float(double(value) - double(max) - std::log(kernels.sum_exp(x, vocab, max)));
}

void sample_row(const KernelTable& kernels, ThreadScratch& scratch, const SamplingArrays& a,
                int64_t row, const float* logits, int vocab, int32_t* token, float* logprob) {
  *token = -1;
  *logprob = std::numeric_limits<float>::quiet_NaN();
  RowStats raw;
  kernels.row_stats(logits, vocab, &raw);
  if (!raw.finite) return;
  const float* x = logits;
  RowStats stats = raw;
  if (is_processed(a, row)) {
    float* copy = scratch.row.get<float>(vocab);
    process_row(a, row, logits, vocab, copy);
    kernels.row_stats(copy, vocab, &stats);
    x = copy;
    // Banned tokens are -inf; anything else that is not finite, or nothing left, ends the row.
    if (!(stats.max < std::numeric_limits<float>::infinity()) ||
        !(stats.max > -std::numeric_limits<float>::infinity()))
      return;
  }
  const float temperature = a.temperature[row];
  if (temperature > 0.0f) {
    RowSampler sampler(kernels, scratch, vocab);
    *token = sampler.draw(x, stats, temperature, a.top_k[row], a.top_p[row], a.min_p[row],
                          a.uniform[row]);
  } else {
    *token = stats.argmax;
  }
  *logprob = log_softmax(kernels, logits, vocab, raw.max, logits[*token]);
}

// A heap of the k best (value, id) so far; its front is the worst of them.
void top_row(const KernelTable& kernels, const float* x, int vocab, int k, int32_t* ids,
             float* logprobs) {
  RowStats stats;
  kernels.row_stats(x, vocab, &stats);
  if (!stats.finite) {
    std::fill(ids, ids + k, -1);
    std::fill(logprobs, logprobs + k, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const auto before = [x](int32_t i, int32_t j) { return x[i] != x[j] ? x[i] > x[j] : i < j; };
  for (int i = 0; i < k; ++i) ids[i] = i;
  std::make_heap(ids, ids + k, before);
  // Ids come in ascending order, so a later equal value never displaces an earlier one.
  for (int i = k; (i = kernels.first_above(x, i, vocab, x[ids[0]])) < vocab; ++i) {
    std::pop_heap(ids, ids + k, before);
    ids[k - 1] = i;
    std::push_heap(ids, ids + k, before);
  }
  std::sort_heap(ids, ids + k, before);
  const double lse = double(stats.max) + std::log(kernels.sum_exp(x, vocab, stats.max));
  for (int i = 0; i < k; ++i) logprobs[i] = float(double(x[ids[i]]) - lse);
}

}  // namespace

void sample(Context& context, const float* logits, int64_t rows, int vocab, int64_t stride,
            const SamplingArrays& arrays, int32_t* tokens, float* logprobs) {
  check_ids("pen_ids", arrays.pen_indptr, arrays.pen_ids, rows, vocab);
  check_ids("bias_ids", arrays.bias_indptr, arrays.bias_ids, rows, vocab);
  const std::lock_guard<std::mutex> guard(context.lock);
  parallel_units(context.threads, rows, [&](int64_t row, int thread) {
    sample_row(*context.kernels, context.scratch[thread], arrays, row, logits + row * stride, vocab,
               tokens + row, logprobs + row);
  });
}

void top_logprobs(Context& context, const float* logits, int64_t rows, int vocab, int64_t stride,
                  int k, int32_t* ids, float* logprobs) {
  if (k < 1 || k > vocab)
    throw std::invalid_argument("k must be in 1.." + std::to_string(vocab) + ", got " +
                                std::to_string(k));
  const std::lock_guard<std::mutex> guard(context.lock);
  parallel_units(context.threads, rows, [&](int64_t row, int) {
    top_row(*context.kernels, logits + row * stride, vocab, k, ids + row * k, logprobs + row * k);
  });
}

}  // namespace dendrite
