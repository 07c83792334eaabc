// Conversions and fast math: every bf16 and fp16 value, and every way to round to one.
#pragma once

#include <cmath>

#include "check.h"

namespace dendrite::test {

template <class T>
DENDRITE_KERNEL widen(float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = to_float(T{uint16_t(i)});
}

template <class T>
DENDRITE_KERNEL narrow(const float* in, uint16_t* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = from_float<T>(in[i]).bits;
}

template <class T>
DENDRITE_KERNEL pack_both(const float* in, uint32_t* packed, float2* unpacked) {
  const unsigned i = threadIdx.x;
  packed[i] = pack2<T>(in[2 * i], in[2 * i + 1]);
  unpacked[i] = unpack2<T>(packed[i]);
}

// The value of sign, exponent and mantissa, in doubles.
template <class T>
double value_of(unsigned bits) {
  constexpr bool is_bf16 = std::is_same_v<T, bf16>;
  constexpr int mantissa = is_bf16 ? 7 : 10, bias = is_bf16 ? 127 : 15;
  const int exponent = int((bits & 0x7fff) >> mantissa);
  const double fraction = double(bits & ((1u << mantissa) - 1));
  const double magnitude = exponent == 0
                               ? std::ldexp(fraction, 1 - bias - mantissa)
                               : std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <class T>
void check_widen(unsigned infinity) {
  Array<float> wide(65536);
  run(widen<T>, 64, 1024, 0, static_cast<float*>(wide));
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const unsigned magnitude = bits & 0x7fff;
    if (magnitude > infinity) {
      expect(std::isnan(wide[bits]), "NaN stays NaN");
    } else if (magnitude == infinity) {
      expect_equal(wide[bits], bits & 0x8000 ? -INFINITY : INFINITY, "infinity", bits);
    } else {
      expect_equal(double(wide[bits]), value_of<T>(bits), "value", bits);
      expect_equal(std::signbit(wide[bits]), bits >= 0x8000, "sign", bits);
    }
  }
}

// Between two neighbours: at the middle to the even one, elsewhere to the nearer one.
template <class T>
void check_narrow(unsigned infinity) {
  Array<float> in(5 * 65536);
  Array<uint16_t> out(5 * 65536);
  for (unsigned bits = 0; bits < 65536; ++bits) {
    if ((bits & 0x7fff) >= infinity) continue;
    const double value = value_of<T>(bits), next = value_of<T>(bits + 1);
    const float middle = float((value + next) / 2);
    in[5 * bits] = float(value);
    in[5 * bits + 1] = std::nextafter(float(value), float(next));
    in[5 * bits + 2] = std::nextafter(middle, float(value));
    in[5 * bits + 3] = middle;
    in[5 * bits + 4] = std::nextafter(middle, float(2 * next - value));
  }
  run(narrow<T>, 5 * 64, 1024, 0, static_cast<const float*>(in), static_cast<uint16_t*>(out));
  for (unsigned bits = 0; bits < 65536; ++bits) {
    if ((bits & 0x7fff) >= infinity) continue;
    const unsigned up = bits + 1, even = bits % 2 == 0 ? bits : up;
    const unsigned wanted[5] = {bits, bits, bits, even, up};
    for (unsigned i = 0; i < 5; ++i)
      expect_equal(unsigned(out[5 * bits + i]), wanted[i], "rounded", 5 * bits + i);
  }
}

template <class T>
void check_special(unsigned infinity) {
  Array<float> in(32);
  Array<uint16_t> out(32);
  const float values[] = {INFINITY, -INFINITY, 3.4e38f, NAN, -NAN, -0.0f};
  std::memcpy(in, values, sizeof values);
  run(narrow<T>, 1, 32, 0, static_cast<const float*>(in), static_cast<uint16_t*>(out));
  expect_equal(out[0], infinity, "infinity");
  expect_equal(out[1], infinity | 0x8000, "minus infinity");
  expect_equal(out[2], infinity, "too large");
  expect((out[3] & 0x7fffu) > infinity && (out[4] & 0x7fffu) > infinity, "NaN stays NaN");
  expect_equal(out[5], 0x8000, "minus zero");
}

template <class T>
void check_packs() {
  Array<float> in(64);
  Array<uint32_t> packed(32);
  Array<float2> unpacked(32);
  for (int i = 0; i < 64; ++i) in[i] = float(i) - 11.5f;
  run(pack_both<T>, 1, 32, 0, static_cast<const float*>(in), static_cast<uint32_t*>(packed),
      static_cast<float2*>(unpacked));
  for (int i = 0; i < 32; ++i) {
    expect_equal(value_of<T>(packed[i] & 0xffff), in[2 * i], "lower half", i);
    expect_equal(value_of<T>(packed[i] >> 16), in[2 * i + 1], "upper half", i);
    expect_equal(unpacked[i].x, in[2 * i], "x", i);
    expect_equal(unpacked[i].y, in[2 * i + 1], "y", i);
  }
}

inline void numbers() {
  check_widen<bf16>(0x7f80);
  check_widen<half_t>(0x7c00);
  check_narrow<bf16>(0x7f80);
  check_narrow<half_t>(0x7c00);
  check_special<bf16>(0x7f80);
  check_special<half_t>(0x7c00);
  check_packs<bf16>();
  check_packs<half_t>();
}

DENDRITE_KERNEL fast_math(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  out[i] = exp2_fast(in[i]);
  out[32 + i] = log2_fast(in[32 + i]);
  out[64 + i] = rsqrt_fast(in[32 + i]);
}

inline void math() {
  Array<float> in(64), out(96);
  for (int i = 0; i < 32; ++i) {
    in[i] = 5.37f * float(i) - 100.0f;
    in[32 + i] = std::exp2(in[i] * 0.9f);
  }
  in[0] = -INFINITY;
  in[1] = 1e5f;
  in[2] = -130.0f;  // the result is subnormal
  run(fast_math, 1, 32, 0, static_cast<const float*>(in), static_cast<float*>(out));
  expect_equal(out[0], 0.0f, "exp2 of minus infinity");
  expect_equal(out[1], INFINITY, "exp2 too large");
  expect_equal(out[2], 0.0f, "exp2 too small");
  const auto close = [](float got, double wanted, double error, const char* what, int i) {
    if (!(std::fabs(got - wanted) <= error)) expect_equal(double(got), wanted, what, i);
  };
  for (int i = 3; i < 32; ++i) {
    const double x = in[i], y = in[32 + i];
    close(out[i], std::exp2(x), std::exp2(x) * 1e-6, "exp2", i);
    close(out[32 + i], std::log2(y), std::fabs(std::log2(y)) * 1e-6 + 1e-6, "log2", i);
    close(out[64 + i], 1 / std::sqrt(y), 1e-6 / std::sqrt(y), "rsqrt", i);
  }
}

}  // namespace dendrite::test
