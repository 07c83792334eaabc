// As rope_store.cuh, into packed pages: per token and head an optional RMS norm, rotary embedding, and
// K and V quantised from fp32. Queries are turned into the basis of rotated keys.
#pragma once

#include "packed_encode.cuh"
#include "packed_params.h"
#include "rope_store.cuh"

namespace dendrite {

static_assert(kRopeVector == kLaneWords, "a lane holds the same elements in both");

DENDRITE_DEVICE VectorPart vector_part(const RopePart& x) {
  VectorPart out;
#pragma unroll
  for (int j = 0; j < kLaneWords; ++j) {
    out.first[j] = x.first[j];
    out.second[j] = x.second[j];
  }
  return out;
}

// x times signs, transformed and scaled to the length that it had; or back.
DENDRITE_DEVICE void rotate_vector(VectorPart& x, const RopePart& signs, int dim,
                                   const LaneGroup& at, bool back) {
  const float root = inverse_root(dim);
#pragma unroll
  for (int j = 0; j < kLaneWords; ++j) {
    x.first[j] = back ? x.first[j] : x.first[j] * signs.first[j];
    x.second[j] = back ? x.second[j] : x.second[j] * signs.second[j];
  }
  hadamard(x, at.lane, at.lanes);
#pragma unroll
  for (int j = 0; j < kLaneWords; ++j) {
    x.first[j] *= back ? root * signs.first[j] : root;
    x.second[j] *= back ? root * signs.second[j] : root;
  }
}

// The parts of a head's vector that a lane loads of a table [kv_heads, dim].
DENDRITE_DEVICE RopePart table_part(const float* table, int head, int dim, int at, bool there) {
  RopePart part;
  if (table != nullptr && there) part.load(table + int64_t(head) * dim + at, dim / 2);
  return part;
}

// Groups of lanes as in rope_store_kv_kernel. Every lane of a warp runs to the end, since groups of
// queries and of keys meet in shuffles.
template <class T>
DENDRITE_KERNEL __launch_bounds__(kRopeThreads, 2)
rope_store_packed_kernel(RopePackedParams params, int lanes) {
  const RopeParams& p = params.rope;
  const int half = p.dim / 2, per_token = p.heads + p.kv_heads;
  const int lane = int(threadIdx.x) % lanes;
  const int group = (int(blockIdx.x) * kRopeThreads + int(threadIdx.x)) / lanes;
  const int token = group / per_token, head = group % per_token;
  const int at = lane * kRopeVector;
  const bool exists = token < p.tokens && at < half;
  const bool is_query = head < p.heads;
  const int kv_head = is_query ? head / (p.heads / p.kv_heads) : head - p.heads;
  const T* norm = static_cast<const T*>(is_query ? p.q_norm : p.k_norm);
  RopePart weight;
  if (norm != nullptr && exists) weight.load(norm + at, half);
  const RopePart k_signs = table_part(params.k_signs, kv_head, p.dim, at, exists);
  const RopePart v_signs = table_part(params.v_signs, kv_head, p.dim, at, exists && !is_query);
  const RopePart mean = table_part(params.k_mean, kv_head, p.dim, at, exists && !is_query);
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
  } else if (active) {
    angles.fill(bits_float(kQuietNan));
  }
  float squares = x.squares();
  for (int mask = lanes / 2; mask > 0; mask /= 2) squares += shfl_xor(squares, mask);
  if (norm != nullptr) x.scale(1.0f / sqrtf(squares / float(p.dim) + p.eps), weight);
  x.rotate(angles);

  const LaneGroup mine{lane, lanes, active};
  VectorPart key = vector_part(x);
  if (is_rotated(params.layer.k.codec)) {
    VectorPart turned = key;
    rotate_vector(turned, k_signs, p.dim, mine, false);
    if (is_query)
      for (int j = 0; j < kLaneWords; ++j) {
        x.first[j] = turned.first[j];
        x.second[j] = turned.second[j];
      }
  }
  if (active && is_query)
    x.store(static_cast<T*>(p.q_out) + (int64_t(token) * p.heads + head) * p.dim + at, half);
  if (!any_sync(stored)) return;

  // See rope_store_kv_kernel: siblings must not see a value that is not finite.
  int bad_value = stored && !value.finite(), bad_key = stored && !x.finite();
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    bad_value |= shfl_xor(bad_value, mask);
    bad_key |= shfl_xor(bad_key, mask);
  }
  if (bad_value != 0) value.fill(0.0f);
  const PackedLayer& layer = params.layer;
  const int page = stored ? slot / layer.page_size : 0, offset = stored ? slot % layer.page_size : 0;
  const int unit = offset / kCellSlots, place = offset % kCellSlots;
  char* cell = layer.data + page * layer.page_bytes + layer.at +
               (int64_t(unit) * layer.kv_heads + (stored ? kv_head : 0)) * layer.cell_bytes();
  const PackedPlace to_key{cell + place * layer.k.row, cell + layer.k_scales() + place * layer.k.scales,
                           p.dim};
  const PackedPlace to_value{cell + layer.v_codes() + place * layer.v.row,
                             cell + layer.v_scales() + place * layer.v.scales, p.dim};
  for (int j = 0; j < kLaneWords; ++j) {
    key.first[j] -= mean.first[j];
    key.second[j] -= mean.second[j];
  }
  const LaneGroup writer{lane, lanes, stored};
  const VectorPart turning = vector_part(v_signs);
  const bool infinite = encode(layer.v.codec, vector_part(value), turning, to_value, writer, false);
  if (any_sync(infinite)) {
    if (infinite) value.fill(0.0f);
    bad_value |= infinite;
    encode(layer.v.codec, vector_part(value), turning, to_value, writer, false);
  }
  encode(layer.k.codec, key, vector_part(k_signs), to_key, writer, (bad_key | bad_value) != 0);
}

// Out of the basis of rotated values.
template <class T>
DENDRITE_KERNEL __launch_bounds__(kRopeThreads) rotate_back_kernel(RotateParams p, int lanes) {
  const int lane = int(threadIdx.x) % lanes, at = lane * kRopeVector, half = p.dim / 2;
  const int group = (int(blockIdx.x) * kRopeThreads + int(threadIdx.x)) / lanes;
  const int head = group % p.heads;
  const bool exists = group < p.rows * p.heads;
  const RopePart signs = table_part(p.signs, head / (p.heads / p.kv_heads), p.dim, at, exists);
  grid_dependency_launch();
  grid_dependency_wait();
  T* place = static_cast<T*>(p.x) + int64_t(group) * p.dim + at;
  RopePart x;
  if (exists) x.load(place, half);
  VectorPart turned = vector_part(x);
  rotate_vector(turned, signs, p.dim, {lane, lanes, exists}, true);
  if (!exists) return;
  store_floats<kRopeVector>(place, turned.first);
  store_floats<kRopeVector>(place + half, turned.second);
}

}  // namespace dendrite
