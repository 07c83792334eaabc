// Layout of what sampling reads and keeps, and the numbers that every pass shares. How a token is
// chosen is described in sampling.cuh.
//
// Everything that is added up over a row is an integer (counts, and weights in fixed point), and
// everything else is a maximum: the result of a row depends neither on how many threads and blocks
// work on it nor on their order.
#pragma once

#include "device.cuh"

// A function that is rarely called, and never inlined.
#ifdef DENDRITE_EMULATE
#define DENDRITE_COLD inline
#else
#define DENDRITE_COLD __device__ __noinline__
#endif

namespace dendrite::sampling {

constexpr int kTile = 512;         // logits that a warp reads at a time; a unit of the log-sum
constexpr int kBins = 2048;        // of the histogram of distances from the maximum
constexpr int kCandidates = 2048;  // tokens that a block sorts at most
constexpr int kWindows = 3;        // places of the order that are looked at closely
constexpr int kReach = 160;        // tokens on both sides of a place that was estimated
constexpr int kMaxVocab = 1 << 19;  // weights are at most 2^44, so that their sum is below 2^64
// Distances that the histogram covers, in units of the temperature. Beyond 32 a weight is 0, so with
// a top-k, for which it counts, only ties and estimates that went wrong need the slow search.
constexpr float kNear = 20.0f, kNearWithTopK = 32.0f;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kInfinity = __builtin_huge_valf();

// The parameters of one step: header, one record a row, then the arrays. sampling_pack.py writes
// them; offsets count 4-byte words from the start of the buffer.
struct Header {
  int version, rows, vocab, words;  // words of a row of the bitmask
  int bias_ids, bias_values, mask, pen_ids, pen_counts, size, unused[6];
};
struct Record {
  float temperature, inverse_temperature;  // inverse 0: greedy
  int top_k;                               // 0: off
  float top_p, min_p, min_p_distance;      // off: 1, 0, infinity
  float repetition, presence, frequency;
  int logits_row;  // -1: no token is wanted
  int previous;    // index in `previous` of a token to count as generated, or -1
  int position;
  uint32_t seed_key[2], path_key[2];  // mix64(seed) and path key, or a double in path_key
  int pen_begin, pen_end, bias_begin, bias_end;  // entries of the arrays, sorted by id
  int mask_row;                                  // -1: none
  int flags, unused[2];
};
constexpr int kVersion = 1, kExplicitUniform = 1;
static_assert(sizeof(Header) == 64 && sizeof(Record) == 96);

// What is known of a row after the first pass.
struct RowState {
  uint64_t best;    // of the processed logits: order_of(value) << 32 | ~id; 0: none
  double log_sum;   // log of the sum of exp(logit - raw_max)
  float raw_max, lowest;  // lowest processed logit that is not banned
  int live;               // tokens that are not banned
  int bad;                // not finite: no token can be chosen
};

// Sum of exp(logit - max) over one tile of a row; their sum goes over tiles in a fixed order.
struct TileSum {
  double sum;
  float max, unused;
};

// Bins [lo, hi] of the histogram that were gathered, as a part of the sorted candidates.
struct Window {
  int lo, hi;
  float lo_edge, hi_edge;  // lo_edge <= distance * scale < hi_edge
  int start, count, before_count;
  uint64_t before;  // weight of all tokens before it
};

// What the second pass adds up.
struct Masses {
  uint64_t total, near_max;  // weights of all tokens; of those that min-p keeps
  int near_max_count;
  float scale;  // bins per unit of distance
};

// Several blocks on one row meet here. Zero before the first use; left so after every use.
struct RowWorkspace {
  int arrivals[2];
  int candidates, unused;
  RowState state;
  int histogram[kBins];
  uint64_t keys[kCandidates];
};
struct BlockPart {  // of one block: of the first, the second and the third pass
  uint64_t best, total, near_max, before[kWindows];
  float lowest;
  int live, bad, near_max_count;
};
constexpr int kMaxBlocks = 32;  // per row

DENDRITE_HOST_DEVICE int tiles_of(int vocab) { return (vocab + kTile - 1) / kTile; }
// A row's workspace: RowWorkspace, BlockPart[kMaxBlocks], TileSum[tiles].
DENDRITE_HOST_DEVICE size_t workspace_bytes(int vocab) {
  return sizeof(RowWorkspace) + kMaxBlocks * sizeof(BlockPart) +
         size_t(tiles_of(vocab)) * sizeof(TileSum);
}

// ---- order

// Ascending with the value; +0 and -0 are the same. 0 is below every number.
DENDRITE_DEVICE uint32_t order_of(float value) {
  const uint32_t bits = float_bits(value + 0.0f);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}
DENDRITE_DEVICE float value_of(uint32_t order) {
  return bits_float(order ^ (order >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}
// Ascending keys are the sampling order: value descending, then id ascending.
DENDRITE_DEVICE uint64_t key_of(float value, int id) {
  return uint64_t(~order_of(value)) << 32 | uint32_t(id);
}
DENDRITE_DEVICE float value_of_key(uint64_t key) { return value_of(~uint32_t(key >> 32)); }
DENDRITE_DEVICE int id_of_key(uint64_t key) { return int(uint32_t(key)); }

// ---- weights

// exp(-distance) in units of 2^-44, in two halves: a thread adds up to 1023 in 32 bits.
struct Weight {
  uint32_t high;  // multiples of 2^-22
  int32_t low;    // the rest in multiples of 2^-44, with a sign
};
DENDRITE_DEVICE Weight weight_at(float distance) {
  const float w = exp2_fast(-distance * kLog2e);
  const float rounded = w + 3.0f;  // at least 2 and at most 4: the last bit is 2^-22
  const float rest = w - (rounded - 3.0f);
  const float scaled = rest * 0x1p44f + 0x1.8p23f;  // the last bit is 1
  return {float_bits(rounded) - 0x40400000u, int32_t(float_bits(scaled) - 0x4b400000u)};
}
DENDRITE_DEVICE uint64_t whole(uint32_t high, int32_t low) {
  return (uint64_t(high) << 22) + uint64_t(int64_t(low));
}
DENDRITE_DEVICE uint64_t whole(Weight weight) { return whole(weight.high, weight.low); }

// How far processed logits are below the maximum, in units of the temperature.
struct Distance {
  float top, inverse;
  DENDRITE_DEVICE float operator()(float value) const { return (top - value) * inverse; }
};

DENDRITE_DEVICE Distance distance_of(const RowState& state, float inverse) {
  return {value_of(uint32_t(state.best >> 32)), inverse};
}
// Bins per unit of distance, so that what is nearer than `near` falls into bins below kBins - 1.
DENDRITE_DEVICE float bin_scale(const RowState& state, Distance distance, float near) {
  const float range = min(distance(state.lowest), near);
  return range > 0.0f ? min((kBins - 1.5f) / range, 1e30f) : 0.0f;
}

DENDRITE_DEVICE float near_of(const Record& record) {
  return record.top_k > 0 ? kNearWithTopK : kNear;
}

// ---- the draw (dendrite_engine.sampling.uniform)

DENDRITE_DEVICE uint64_t mix64(uint64_t value) {
  value += 0x9e3779b97f4a7c15ull;
  value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9ull;
  value = (value ^ value >> 27) * 0x94d049bb133111ebull;
  return value ^ value >> 31;
}
DENDRITE_DEVICE double uniform_of(const Record& record) {
  const uint64_t path = uint64_t(record.path_key[1]) << 32 | record.path_key[0];
  if (record.flags & kExplicitUniform) {
    double value;
    memcpy(&value, &path, sizeof value);
    return value;
  }
  const uint64_t seed = uint64_t(record.seed_key[1]) << 32 | record.seed_key[0];
  const uint64_t bits = mix64(seed ^ mix64(path ^ mix64(uint64_t(int64_t(record.position)))));
  return double(bits >> 11) * 0x1p-53;
}

}  // namespace dendrite::sampling
