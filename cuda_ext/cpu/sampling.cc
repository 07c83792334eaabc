// Samples without sorting the vocabulary. Tokens are ordered by (processed logit descending, id
// ascending). First only the tokens near the maximum are looked at; the others count as one mass, and
// the rare draw that needs them starts again with every token. Candidates fall into buckets of equal
// width below the maximum; the buckets are in sampling order too. Every filter keeps a prefix of the
// order, so a filter is one `Cut`: all candidates of the buckets before `bucket` and the first `count`
// of that bucket's sorted candidates. Only buckets in which a cut or the sampled point falls are ever
// sorted. Sums run in double, in a fixed order.
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

constexpr int kBuckets = 2048;
constexpr float kNear = 10.0f;  // nats below the maximum: the rest weighs less than e^-10 each
constexpr int32_t kTooFar = -2;

struct Cut {
  int bucket;   // kBuckets: everything, far tokens included
  int count;    // candidates kept of that bucket
  double mass;  // weight of all kept tokens
};

struct Filter {
  float temperature;
  int top_k;
  float top_p, min_p;
  double uniform;
};

class RowSampler {
 public:
  RowSampler(const KernelTable& kernels, ThreadScratch& scratch, const float* x, int vocab,
             const RowStats& stats, const Filter& filter)
      : kernels_(kernels), x_(x), vocab_(vocab), stats_(stats), filter_(filter) {
    inverse_ = 1.0f / filter.temperature;
    ids_ = scratch.ids.get<int32_t>(2 * vocab + 16);
    order_ = ids_ + vocab + 8;
    weight_ = scratch.weight.get<float>(vocab + 1);
    bucket_ = scratch.bucket.get<uint16_t>(vocab);
  }

  int32_t draw() {
    const int32_t token = draw_within(kNear);
    return token != kTooFar ? token : draw_within(std::numeric_limits<float>::infinity());
  }

 private:
  // kTooFar when the answer depends on tokens further than `distance` below the maximum.
  int32_t draw_within(float distance) {
    collect(distance);
    Cut cut = all();
    const bool filters = keep_most_likely(cut) && keep_mass(cut) && keep_near_max(cut);
    return filters ? locate(cut, filter_.uniform * cut.mass) : kTooFar;
  }

  void collect(float distance) {
    far_mass_ = 0.0;
    count_ = kernels_.near_tokens(x_, vocab_, stats_.max, inverse_, distance, ids_, weight_,
                                  &far_mass_);
    complete_ = distance > kNear;
    if (complete_) far_mass_ = 0.0;
    // 64 nats below the maximum a token weighs e^-64: the last bucket may hold all of those.
    const float range =
        std::min(std::min(64.0f, distance), (stats_.max - stats_.min) * inverse_);
    scale_ = range > 0.0f ? std::min(float(kBuckets - 1) / range, 1e30f) : 0.0f;
    std::fill(counts_, counts_ + kBuckets, 0);
    std::fill(mass_, mass_ + kBuckets, 0.0);
    for (int i = 0; i < count_; ++i) {
      const int b = bucket_of(below_max(ids_[i]));
      bucket_[i] = uint16_t(b);
      ++counts_[b];
      mass_[b] += double(weight_[i]);
    }
    sorted_bucket_ = -1;
  }

  float below_max(int32_t id) const { return (stats_.max - x_[id]) * inverse_; }
  int bucket_of(float distance) const {
    return int(std::min(distance * scale_, float(kBuckets - 1)));
  }

  Cut all() const {
    double mass = far_mass_;
    for (int b = 0; b < kBuckets; ++b) mass += mass_[b];
    return {kBuckets, 0, mass};
  }

  // Leaves the candidates of a bucket in order_, in sampling order; returns how many.
  int sort_bucket(int b) {
    if (sorted_bucket_ == b) return counts_[b];
    const int n = kernels_.find_bucket(bucket_, count_, uint16_t(b), order_);
    const auto before = [this](int32_t i, int32_t j) {
      const float a = x_[ids_[i]], c = x_[ids_[j]];
      return a != c ? a > c : i < j;
    };
    if (!std::is_sorted(order_, order_ + n, before)) std::sort(order_, order_ + n, before);
    sorted_bucket_ = b;
    return n;
  }
  double sorted_weight(int i) const { return double(weight_[order_[i]]); }

  // top-k; false: too far.
  bool keep_most_likely(Cut& cut) {
    int left = filter_.top_k;
    if (left <= 0 || left >= vocab_) return true;
    if (left > count_) return complete_;
    double mass = 0.0;
    int b = 0;
    for (; counts_[b] < left; ++b) {
      left -= counts_[b];
      mass += mass_[b];
    }
    sort_bucket(b);
    for (int i = 0; i < left; ++i) mass += sorted_weight(i);
    cut = {b, left, mass};
    return true;
  }

  // top-p: the shortest prefix of `cut` whose mass reaches top_p times the cut's; false: too far.
  bool keep_mass(Cut& cut) {
    if (filter_.top_p >= 1.0f) return true;
    const double wanted = double(filter_.top_p) * cut.mass;
    double mass = 0.0;
    int b = 0;
    while (b < cut.bucket && (counts_[b] == 0 || mass + mass_[b] < wanted)) mass += mass_[b++];
    if (b >= kBuckets) return complete_;
    sort_bucket(b);
    const int n = b == cut.bucket ? cut.count : counts_[b];
    int kept = 0;
    while (kept < n) {
      mass += sorted_weight(kept++);
      if (mass >= wanted) break;
    }
    cut = {b, kept, mass};
    return true;
  }

  // min-p: the prefix of `cut` with at least min_p times the largest probability; false: too far.
  bool keep_near_max(Cut& cut) {
    if (!(filter_.min_p > 0.0f)) return true;
    const float distance = -std::log(std::min(filter_.min_p, 1.0f));
    if (cut.bucket == kBuckets && !complete_ && distance > kNear) return false;
    const int limit = bucket_of(distance);
    if (limit > cut.bucket) return true;
    double mass = 0.0;
    for (int b = 0; b < limit; ++b) mass += mass_[b];
    sort_bucket(limit);
    const int n = limit == cut.bucket ? cut.count : counts_[limit];
    int kept = 0;
    for (; kept < n && below_max(ids_[order_[kept]]) <= distance; ++kept)
      mass += sorted_weight(kept);
    cut = {limit, kept, mass};
    return true;
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
        mass += sorted_weight(i);
        if (mass > target) return ids_[order_[i]];
      }
    }
    if (cut.bucket == kBuckets && !complete_) return kTooFar;
    sort_bucket(last);
    return ids_[order_[(last == cut.bucket ? cut.count : counts_[last]) - 1]];
  }

  const KernelTable& kernels_;
  const float* x_;  // processed logits
  const int vocab_;
  const RowStats stats_;  // of x_; the maximum is finite
  const Filter filter_;
  float inverse_, scale_ = 0.0f;
  int32_t* ids_;      // [count_] candidates, ascending
  int32_t* order_;    // indices into ids_ of one sorted bucket
  float* weight_;     // [count_]
  uint16_t* bucket_;  // [count_]
  int count_ = 0, sorted_bucket_ = -1;
  bool complete_ = false;  // every token is a candidate
  double far_mass_ = 0.0;
  int32_t counts_[kBuckets];
  double mass_[kBuckets];
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
    const Filter filter{temperature, a.top_k[row], a.top_p[row], a.min_p[row], a.uniform[row]};
    *token = RowSampler(kernels, scratch, x, vocab, stats, filter).draw();
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
