// Per token and head: an optional RMS norm, rotary embedding, and the store of K and V into pages.
#pragma once

#include "row_params.h"
#include "vectors.cuh"

namespace dendrite {

constexpr int kRopeThreads = 128;
constexpr uint32_t kQuietNan = 0x7fc00000u;

// A group of `lanes` lanes (a power of two, at least dim / 2 / kWidth) works on a head; lane i
// holds the elements i * kWidth.. of both halves. Groups go over heads + kv_heads of each token: a
// query head, or a key head together with its value head.
template <class T, int kWidth>
struct RopeHead {
  float first[kWidth], second[kWidth];

  DENDRITE_DEVICE void load(const T* head, int half, bool active) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) first[j] = second[j] = 0.0f;
    if (!active) return;
    load_floats<kWidth>(first, head);
    load_floats<kWidth>(second, head + half);
  }

  DENDRITE_DEVICE void store(T* head, int half) const {
    store_floats<kWidth>(head, first);
    store_floats<kWidth>(head + half, second);
  }

  DENDRITE_DEVICE void norm(const float (&weight_first)[kWidth],
                            const float (&weight_second)[kWidth], float eps, int dim, int lanes) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) squares += first[j] * first[j] + second[j] * second[j];
    for (int mask = lanes / 2; mask > 0; mask /= 2) squares += shfl_xor(squares, mask);
    const float scale = 1.0f / sqrtf(squares / float(dim) + eps);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      first[j] *= scale * weight_first[j];
      second[j] *= scale * weight_second[j];
    }
  }

  DENDRITE_DEVICE void rotate(const float* cos, const float* sin, bool known) {
    float c[kWidth], s[kWidth];
    if (known) {
      load_floats<kWidth>(c, cos);
      load_floats<kWidth>(s, sin);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) c[j] = s[j] = bits_float(kQuietNan);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float a = first[j], b = second[j];
      first[j] = a * c[j] - b * s[j];
      second[j] = b * c[j] + a * s[j];
    }
  }

  DENDRITE_DEVICE bool finite() const {
    bool all = true;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) all = all && is_finite(first[j]) && is_finite(second[j]);
    return all;
  }

  DENDRITE_DEVICE static bool is_finite(float value) {
    return (float_bits(value) & 0x7f800000u) != 0x7f800000u;
  }
};

template <class T, int kWidth>
DENDRITE_KERNEL __launch_bounds__(kRopeThreads) rope_store_kv_kernel(RopeParams p, int lanes) {
  const int half = p.dim / 2, per_token = p.heads + p.kv_heads;
  const int lane = int(threadIdx.x) % lanes;
  const int group = (int(blockIdx.x) * int(blockDim.x) + int(threadIdx.x)) / lanes;
  const int token = group / per_token, head = group % per_token;
  const int at = lane * kWidth;
  const bool active = token < p.tokens && at < half;
  const bool is_query = head < p.heads;
  const int kv_head = head - p.heads;

  const T* norm = static_cast<const T*>(is_query ? p.q_norm : p.k_norm);
  float norm_first[kWidth] = {}, norm_second[kWidth] = {};
  if (norm != nullptr && active) {
    load_floats<kWidth>(norm_first, norm + at);
    load_floats<kWidth>(norm_second, norm + half + at);
  }
  grid_dependency_wait();
  grid_dependency_launch();

  const T* in = static_cast<const T*>(p.qkv) +
                (int64_t(token) * (per_token + p.kv_heads) + head) * p.dim + at;
  const int slot = active && !is_query ? p.slots[token] : -1;
  const bool stored = slot >= 0 && slot < p.num_slots;
  RopeHead<T, kWidth> x, value;
  x.load(in, half, active && (is_query || stored));
  value.load(in + int64_t(p.kv_heads) * p.dim, half, stored);
  // Every lane of the warp takes part in the shuffles, whatever its group does.
  if (p.q_norm != nullptr || p.k_norm != nullptr) {
    RopeHead<T, kWidth> normed = x;
    normed.norm(norm_first, norm_second, p.eps, p.dim, lanes);
    if (norm != nullptr) x = normed;
  }
  int bad = stored && !value.finite();
  for (int mask = lanes / 2; mask > 0; mask /= 2) bad |= shfl_xor(bad, mask);
  if (!active || !(is_query || stored)) return;

  const int position = p.positions[token];
  const bool known = position >= 0 && position < p.max_position;
  const int64_t angles = int64_t(known ? position : 0) * half + at;
  x.rotate(p.cos + angles, p.sin + angles, known);
  if (is_query) {
    x.store(static_cast<T*>(p.q_out) + (int64_t(token) * p.heads + head) * p.dim + at, half);
    return;
  }
  // Where V is not finite, siblings that multiply it by a weight of 0 would see NaN. They get 0;
  // the branch itself gets NaN, through its scores.
  if (bad) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) value.first[j] = value.second[j] = 0.0f;
    if (lane == 0) x.first[0] = bits_float(kQuietNan);
  }
  const int page = slot / p.page_size, offset = slot % p.page_size;
  const int64_t place =
      ((int64_t(page) * p.kv_heads + kv_head) * p.page_size + offset) * p.dim + at;
  x.store(static_cast<T*>(p.k_pages) + place, half);
  value.store(static_cast<T*>(p.v_pages) + place, half);
}

}  // namespace dendrite
