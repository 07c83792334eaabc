// ldmatrix and mma against what the PTX manual says of their registers, and against plain loops.
#pragma once

#include "check.h"

namespace dendrite::test {

// Shared memory holds 32 rows of 8 numbers, 24 numbers apart: number = 100 * row + column.
constexpr int kRowStride = 24;

DENDRITE_KERNEL load_matrices(uint32_t* out) {
  DENDRITE_SHARED_MEMORY(uint16_t, shared);
  const unsigned lane = threadIdx.x;
  for (unsigned c = 0; c < 8; ++c) shared[lane * kRowStride + c] = uint16_t(100 * lane + c);
  sync_warp();
  const uint16_t* row = shared + lane * kRowStride;
  uint32_t four[4], two[2];
  uint32_t* own = out + 12 * lane;
  ldmatrix_x4(four, row);
  for (int i = 0; i < 4; ++i) own[i] = four[i];
  ldmatrix_x4_trans(four, row);
  for (int i = 0; i < 4; ++i) own[4 + i] = four[i];
  ldmatrix_x2(two, row);
  for (int i = 0; i < 2; ++i) own[8 + i] = two[i];
  ldmatrix_x2_trans(two, row);
  for (int i = 0; i < 2; ++i) own[10 + i] = two[i];
}

inline void matrices() {
  Array<uint32_t> out(12 * 32);
  run(load_matrices, 1, 32, 32 * kRowStride * 2, static_cast<uint32_t*>(out));
  const auto number = [](int matrix, int row, int column) {
    return uint32_t(100 * (8 * matrix + row) + column);
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int i = 0; i < 12; ++i) {
      const int matrix = i < 8 ? i % 4 : i % 2;
      const bool trans = (i >= 4 && i < 8) || i >= 10;
      const uint32_t low = trans ? number(matrix, t, g) : number(matrix, g, t);
      const uint32_t high = trans ? number(matrix, t + 1, g) : number(matrix, g, t + 1);
      expect_equal(out[12 * lane + i], low | high << 16, "register", 100 * lane + i);
    }
  }
}

// d += a * b with fragments put together by hand. a [16, 16], b [16, 8], d [16, 8].
template <class T>
DENDRITE_KERNEL multiply_by_hand(const float* a, const float* b, float* d) {
  const int g = int(threadIdx.x) / 4, t = 2 * (int(threadIdx.x) % 4);
  const auto pair_a = [&](int row, int k) {
    return pack2<T>(a[row * 16 + k], a[row * 16 + k + 1]);
  };
  const auto pair_b = [&](int k) { return pack2<T>(b[k * 8 + g], b[k * 8 + 8 + g]); };
  const uint32_t left[4] = {pair_a(g, t), pair_a(g + 8, t), pair_a(g, t + 8), pair_a(g + 8, t + 8)};
  const uint32_t right[2] = {pair_b(t), pair_b(t + 8)};
  float* const at[4] = {d + g * 8 + t, d + g * 8 + t + 1, d + g * 8 + 64 + t,
                        d + g * 8 + 64 + t + 1};
  float sum[4] = {*at[0], *at[1], *at[2], *at[3]};
  mma_m16n8k16<T>(sum, left, right);
  for (int i = 0; i < 4; ++i) *at[i] = sum[i];
}

// The same twice over, with fragments from shared memory: b as [k, n], then as [n, k].
template <class T>
DENDRITE_KERNEL multiply_loaded(const float* a, const float* b, float* d) {
  DENDRITE_SHARED_MEMORY(char, smem);
  T* left = reinterpret_cast<T*>(smem);  // [16, 24]
  T* right = left + 16 * 24;             // [16, 8]
  T* turned = right + 16 * 8;            // [8, 24]
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 256; i += 32) left[i / 16 * 24 + i % 16] = from_float<T>(a[i]);
  for (int i = lane; i < 128; i += 32) {
    right[i] = from_float<T>(b[i]);
    turned[i % 8 * 24 + i / 8] = from_float<T>(b[i]);
  }
  sync_warp();
  uint32_t fragment[4], column[2];
  float sum[4] = {};
  ldmatrix_x4(fragment, left + lane % 16 * 24 + lane / 16 * 8);
  ldmatrix_x2_trans(column, right + lane % 16 * 8);
  mma_m16n8k16<T>(sum, fragment, column);
  ldmatrix_x2(column, turned + lane % 8 * 24 + lane % 16 / 8 * 8);
  mma_m16n8k16<T>(sum, fragment, column);
  const int g = lane / 4, t = 2 * (lane % 4);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t + i % 2] += sum[i];
}

// Small multiples of 1/4: every product and sum is exact.
template <class T>
void check_product(void (*kernel)(const float*, const float*, float*), int times) {
  Array<float> a(256), b(128), d(128);
  for (int i = 0; i < 256; ++i) a[i] = float(i * 37 % 61 - 30) / 4;
  for (int i = 0; i < 128; ++i) b[i] = float(i * 53 % 47 - 23) / 4;
  for (int i = 0; i < 128; ++i) d[i] = float(i);
  run(kernel, 1, 32, 4096, static_cast<const float*>(a), static_cast<const float*>(b),
      static_cast<float*>(d));
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float wanted = 0.0f;
      for (int k = 0; k < 16; ++k) wanted += a[m * 16 + k] * b[k * 8 + n];
      expect_equal(d[m * 8 + n], float(m * 8 + n) + float(times) * wanted, "product", m * 8 + n);
    }
}

inline void products() {
  check_product<bf16>(multiply_by_hand<bf16>, 1);
  check_product<half_t>(multiply_by_hand<half_t>, 1);
  check_product<bf16>(multiply_loaded<bf16>, 2);
  check_product<half_t>(multiply_loaded<half_t>, 2);
}

}  // namespace dendrite::test
