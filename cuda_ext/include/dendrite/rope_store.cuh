// Per token and head: an optional RMS norm, rotary embedding, and the store of K and V into pages.
#pragma once

#include "row_params.h"
#include "vectors.cuh"

namespace dendrite {

constexpr int kRopeThreads = 128;
constexpr int kRopeVector = 4;  // so that half of any head of a multiple of 8 is whole vectors
constexpr uint32_t kQuietNan = 0x7fc00000u;

// What a lane holds of a head: kRopeVector elements of its first half, and those they turn with.
struct RopePart {
  float first[kRopeVector] = {}, second[kRopeVector] = {};

  template <class T>
  DENDRITE_DEVICE void load(const T* at, int half) {
    load_floats<kRopeVector>(first, at);
    load_floats<kRopeVector>(second, at + half);
  }
  template <class T>
  DENDRITE_DEVICE void store(T* at, int half) const {
    store_floats<kRopeVector>(at, first);
    store_floats<kRopeVector>(at + half, second);
  }
  DENDRITE_DEVICE void fill(float value) {
#pragma unroll
    for (int j = 0; j < kRopeVector; ++j) first[j] = second[j] = value;
  }

  DENDRITE_DEVICE float squares() const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kRopeVector; ++j) sum += first[j] * first[j] + second[j] * second[j];
    return sum;
  }
  DENDRITE_DEVICE void scale(float factor, const RopePart& weight) {
#pragma unroll
    for (int j = 0; j < kRopeVector; ++j) {
      first[j] *= factor * weight.first[j];
      second[j] *= factor * weight.second[j];
    }
  }
  // `angles` holds cosines (first) and sines (second).
  DENDRITE_DEVICE void rotate(const RopePart& angles) {
#pragma unroll
    for (int j = 0; j < kRopeVector; ++j) {
      const float a = first[j], b = second[j];
      first[j] = a * angles.first[j] - b * angles.second[j];
      second[j] = b * angles.first[j] + a * angles.second[j];
    }
  }
  DENDRITE_DEVICE bool finite() const {
    bool all = true;
#pragma unroll
    for (int j = 0; j < kRopeVector; ++j) all = all && is_finite(first[j]) && is_finite(second[j]);
    return all;
  }
  DENDRITE_DEVICE static bool is_finite(float value) {
    return (float_bits(value) & 0x7f800000u) != 0x7f800000u;
  }
};

// `lanes` lanes (a power of two that covers half a head) form a group. Groups go over the
// heads + kv_heads of each token: a query head, or a key head together with its value head.
template <class T>
DENDRITE_KERNEL __launch_bounds__(kRopeThreads) rope_store_kv_kernel(RopeParams p, int lanes) {
  const int half = p.dim / 2, per_token = p.heads + p.kv_heads;
  const int lane = int(threadIdx.x) % lanes;
  const int group = (int(blockIdx.x) * kRopeThreads + int(threadIdx.x)) / lanes;
  const int token = group / per_token, head = group % per_token;
  const int at = lane * kRopeVector;
  const bool exists = token < p.tokens && at < half;
  const bool is_query = head < p.heads;
  const T* norm = static_cast<const T*>(is_query ? p.q_norm : p.k_norm);
  RopePart weight;
  if (norm != nullptr && exists) weight.load(norm + at, half);
  grid_dependency_launch();
  grid_dependency_wait();

  const int slot = exists ? p.slots[token] : -1;
  const int position = exists ? p.positions[token] : -1;
  const bool stored = !is_query && slot >= 0 && slot < p.num_slots;
  const bool active = exists && (is_query || stored);
  const T* in = static_cast<const T*>(p.qkv) +
                (int64_t(token) * (per_token + p.kv_heads) + head) * p.dim + at;
  RopePart x, value, angles;
  if (active) x.load(in, half);
  if (stored) value.load(in + int64_t(p.kv_heads) * p.dim, half);
  if (position >= 0 && position < p.max_position) {
    load_floats<kRopeVector>(angles.first, p.cos + int64_t(position) * half + at);
    load_floats<kRopeVector>(angles.second, p.sin + int64_t(position) * half + at);
  } else {
    angles.fill(bits_float(kQuietNan));
  }

  // Every lane of the warp takes part in the shuffles, whatever its group does.
  float squares = x.squares();
  int bad = stored && !value.finite();
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    squares += shfl_xor(squares, mask);
    bad |= shfl_xor(bad, mask);
  }
  if (!active) return;
  if (norm != nullptr) x.scale(1.0f / sqrtf(squares / float(p.dim) + p.eps), weight);
  x.rotate(angles);
  if (is_query) {
    x.store(static_cast<T*>(p.q_out) + (int64_t(token) * p.heads + head) * p.dim + at, half);
    return;
  }
  // Where V is not finite, siblings that multiply it by a weight of 0 would see NaN. They get 0;
  // the branch itself gets NaN, through its scores.
  if (bad) {
    value.fill(0.0f);
    if (lane == 0) x.first[0] = bits_float(kQuietNan);
  }
  const int page = slot / p.page_size, offset = slot % p.page_size;
  const int64_t row = (int64_t(page) * p.kv_heads + head - p.heads) * p.page_size + offset;
  x.store(static_cast<T*>(p.k_pages) + row * p.dim + at, half);
  value.store(static_cast<T*>(p.v_pages) + row * p.dim + at, half);
}

}  // namespace dendrite
