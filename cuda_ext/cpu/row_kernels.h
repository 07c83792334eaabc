// Per-row kernels: RMS norm, rotary embedding with the K/V store, SwiGLU, and the passes over a row
// of logits. Reductions use a fixed number of lanes and a fixed order, so a row never depends on
// the batch it is in.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace dendrite::DENDRITE_ISA {
namespace {

float sum_squares(const float* x, int n) {
  vf sum[4] = {splat<vf>(0.0f), splat<vf>(0.0f), splat<vf>(0.0f), splat<vf>(0.0f)};
  int i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) {
      const vf v = load<vf>(x + i + j * W);
      sum[j] = fma(v, v, sum[j]);
    }
  for (; i + W <= n; i += W) {
    const vf v = load<vf>(x + i);
    sum[0] = fma(v, v, sum[0]);
  }
  float total = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; ++i) total += x[i] * x[i];
  return total;
}

DENDRITE_INLINE float inverse_rms(const float* x, int n, float eps) {
  return 1.0f / __builtin_sqrtf(sum_squares(x, n) / float(n) + eps);
}

void add_rms_norm(const float* x, float* residual, const float* weight, float eps, float* out,
                  int64_t row_begin, int64_t row_end, int width) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* in = x + row * width;
    if (residual != nullptr) {
      float* sum = residual + row * width;
      for (int i = 0; i < width; ++i) sum[i] += in[i];
      in = sum;
    }
    const float scale = inverse_rms(in, width, eps);
    float* o = out + row * width;
    for (int i = 0; i < width; ++i) o[i] = in[i] * scale * weight[i];
  }
}

// Rotates one head: out[i] = a*cos - b*sin, out[i + half] = b*cos + a*sin (a, b: the two halves).
DENDRITE_INLINE void rotate_head(const float* x, const float* norm, float eps, const float* cos,
                                 const float* sin, int dim, float* __restrict out) {
  const int half = dim / 2;
  if (norm != nullptr) {
    const float scale = inverse_rms(x, dim, eps);
    for (int i = 0; i < half; ++i) {
      const float a = x[i] * scale * norm[i], b = x[i + half] * scale * norm[i + half];
      out[i] = a * cos[i] - b * sin[i];
      out[i + half] = b * cos[i] + a * sin[i];
    }
    return;
  }
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = a * cos[i] - b * sin[i];
    out[i + half] = b * cos[i] + a * sin[i];
  }
}

void rope_store_kv(const RopeJob& job, int64_t row_begin, int64_t row_end) {
  const int dim = job.dim, size = job.page_size;
  const int64_t row_width = int64_t(job.heads + 2 * job.kv_heads) * dim;
  const int64_t page_floats = int64_t(job.kv_heads) * dim * size;
  alignas(64) float key[1024];
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* in = job.qkv + row * row_width;
    const float* cos = job.cos + int64_t(job.positions[row]) * (dim / 2);
    const float* sin = job.sin + int64_t(job.positions[row]) * (dim / 2);
    float* q = job.q_out + row * job.heads * dim;
    for (int h = 0; h < job.heads; ++h)
      rotate_head(in + h * dim, job.q_norm, job.eps, cos, sin, dim, q + h * dim);
    const int32_t slot = job.slots[row];
    if (slot < 0 || job.k_side != nullptr) continue;
    const int64_t page = slot / size, offset = slot % size;
    in += job.heads * dim;
    for (int h = 0; h < job.kv_heads; ++h) {
      rotate_head(in + h * dim, job.k_norm, job.eps, cos, sin, dim, key);
      float* k = job.k_pages + page * page_floats + int64_t(h) * dim * size + offset;
      for (int d = 0; d < dim; ++d) k[d * size] = key[d];
      float* v = job.v_pages + page * page_floats + (int64_t(h) * size + offset) * dim;
      __builtin_memcpy(v, in + (job.kv_heads + h) * dim, sizeof(float) * dim);
    }
  }
}

// The rotated key of one row and kv head.
void rotate_key(const RopeJob& job, int64_t row, int head, float* key) {
  const int dim = job.dim;
  const int64_t angle = int64_t(job.positions[row]) * (dim / 2);
  const float* in = job.qkv + (row * (job.heads + 2 * job.kv_heads) + job.heads + head) * dim;
  rotate_head(in, job.k_norm, job.eps, job.cos + angle, job.sin + angle, dim, key);
}

DENDRITE_INLINE vf silu_lanes(vf x) {
  const vf one = splat<vf>(1.0f);
  return x / (one + exp_lanes(-x));
}

void silu_mul(const float* gate_up, float* out, int64_t row_begin, int64_t row_end, int width) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* gate = gate_up + row * 2 * width;
    const float* up = gate + width;
    float* o = out + row * width;
    int i = 0;
    for (; i + W <= width; i += W)
      store(o + i, silu_lanes(load<vf>(gate + i)) * load<vf>(up + i));
    for (; i < width; ++i) o[i] = silu_lanes(splat<vf>(gate[i]))[0] * up[i];
  }
}

void row_stats(const float* x, int n, RowStats* stats) {
  const float inf = __builtin_inff();
  const vf plus = splat<vf>(inf), minus = splat<vf>(-inf);
  vf high = minus, low = plus;
  vi bad = splat_int(0);
  int i = 0;
  for (; i + W <= n; i += W) {
    const vf v = load<vf>(x + i);
    high = v > high ? v : high;
    const vi above = v > minus, below = v < plus;
    bad |= ~(above & below);
    const vf lower = above ? v : plus;
    low = lower < low ? lower : low;
  }
  float top = max_lanes(high), bottom = -max_lanes(-low);
  bool finite = !any_set(bad);
  for (; i < n; ++i) {
    if (!(x[i] > -inf && x[i] < inf)) finite = false;
    if (x[i] > top) top = x[i];
    if (x[i] > -inf && x[i] < bottom) bottom = x[i];
  }
  const vf wanted = splat<vf>(top);
  for (i = 0; i + W <= n; i += W)
    if (any_set(load<vf>(x + i) == wanted)) break;
  while (i < n && !(x[i] == top)) ++i;
  *stats = RowStats{top, bottom, i < n ? i : -1, finite};
}

// Sum of exp(x - max): lane sums of 4 * W columns in order, widened to double every 4096 columns.
double sum_exp(const float* x, int n, float max) {
  const vf shift = splat<vf>(max);
  double total = 0.0;
  int i = 0;
  while (i + 4 * W <= n) {
    const int stop = least(n, i + 4096);
    vf sum[4] = {splat<vf>(0.0f), splat<vf>(0.0f), splat<vf>(0.0f), splat<vf>(0.0f)};
    for (; i + 4 * W <= stop; i += 4 * W)
      for (int j = 0; j < 4; ++j) sum[j] += exp_lanes(load<vf>(x + i + j * W) - shift);
    total += double(sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
  for (; i < n; ++i) total += double(exp_one(x[i] - max));
  return total;
}

int near_tokens(const float* x, int n, float max, float inv_temperature, float distance, int32_t* ids,
                float* weights, double* far_mass) {
  const vf top = splat<vf>(max), inverse = splat<vf>(inv_temperature), limit = splat<vf>(distance);
  const vf minus = splat<vf>(-__builtin_inff());
  double far = 0.0;
  int found = 0;
  for (int i = 0; i < n;) {
    const int stop = least(n, i + 4096);
    vf sum = splat<vf>(0.0f);
    for (; i < stop; i += W) {
      const int count = least(W, n - i);
      vf v = minus;
      __builtin_memcpy(&v, x + i, sizeof(float) * count);
      const vf t = (top - v) * inverse;
      const vf weight = exp_lanes(-t);
      const vi near = (t <= limit) & (v > minus);
      sum += (vf)(~near & bits(weight));
      if (!any_set(near)) continue;
      for (int j = 0; j < count; ++j) {
        ids[found] = i + j;
        weights[found] = weight[j];
        found += near[j] != 0;
      }
    }
    far += double(sum_lanes(sum));
  }
  *far_mass = far;
  return found;
}

int find_bucket(const uint16_t* bucket, int n, uint16_t wanted, int32_t* out) {
  int found = 0, i = 0;
  for (; i + 64 <= n; i += 64) {
    uint16_t hit = 0;
    for (int j = 0; j < 64; ++j) hit |= uint16_t(bucket[i + j] == wanted);
    if (!hit) continue;
    for (int j = 0; j < 64; ++j)
      if (bucket[i + j] == wanted) out[found++] = i + j;
  }
  for (; i < n; ++i)
    if (bucket[i] == wanted) out[found++] = i;
  return found;
}

int first_above(const float* x, int begin, int n, float threshold) {
  const vf limit = splat<vf>(threshold);
  int i = begin;
  for (; i + 2 * W <= n; i += 2 * W) {
    const vi hit = (load<vf>(x + i) > limit) | (load<vf>(x + i + W) > limit);
    if (any_set(hit)) break;
  }
  while (i < n && !(x[i] > threshold)) ++i;
  return i;
}

}  // namespace

// The table of this instruction set; `name` is what reports show.
static const KernelTable kTable = {
    DENDRITE_NAME, attend_chunk,  attend_packed_chunk, rotate,   store_packed, merge_state,
    finish_row,    add_rms_norm,  rope_store_kv,       rotate_key, silu_mul,   row_stats,
    sum_exp,       near_tokens,   find_bucket,         first_above,
};

}  // namespace dendrite::DENDRITE_ISA
