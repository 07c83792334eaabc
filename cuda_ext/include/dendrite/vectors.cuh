// N consecutive values of a type, moved as a whole: what rows of activations are read in.
#pragma once

#include "device.cuh"

namespace dendrite {

// N values as they lie in memory. Their address is a multiple of their size, up to 16.
template <class T, int N>
struct Packed {
  static constexpr int kWords = N * int(sizeof(T)) / 4;
  static_assert(kWords == 2 || kWords % 4 == 0, "8 bytes, or a multiple of 16");
  uint32_t words[kWords];
};

template <class T, int N>
DENDRITE_DEVICE Packed<T, N> load_packed(const T* from) {
  Packed<T, N> out;
  if constexpr (Packed<T, N>::kWords == 2) {
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    out.words[0] = two.x;
    out.words[1] = two.y;
  } else {
#pragma unroll
    for (int i = 0; i < Packed<T, N>::kWords; i += 4) {
      const uint4 four = load_16(reinterpret_cast<const char*>(from) + 4 * i);
      out.words[i] = four.x;
      out.words[i + 1] = four.y;
      out.words[i + 2] = four.z;
      out.words[i + 3] = four.w;
    }
  }
  return out;
}

template <class T, int N>
DENDRITE_DEVICE void store_packed(T* to, const Packed<T, N>& values) {
  if constexpr (Packed<T, N>::kWords == 2) {
    *reinterpret_cast<uint2*>(to) = make_uint2(values.words[0], values.words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < Packed<T, N>::kWords; i += 4)
      store_16(reinterpret_cast<char*>(to) + 4 * i,
               make_uint4(values.words[i], values.words[i + 1], values.words[i + 2],
                          values.words[i + 3]));
  }
}

template <class T, int N>
DENDRITE_DEVICE void unpack(float (&out)[N], const Packed<T, N>& values) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = bits_float(values.words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 two = unpack2<T>(values.words[i]);
      out[2 * i] = two.x;
      out[2 * i + 1] = two.y;
    }
  }
}

// Rounds to T.
template <class T, int N>
DENDRITE_DEVICE Packed<T, N> pack(const float (&values)[N]) {
  Packed<T, N> out;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) out.words[i] = float_bits(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) out.words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
  }
  return out;
}

template <int N, class T>
DENDRITE_DEVICE void load_floats(float (&out)[N], const T* from) {
  unpack<T, N>(out, load_packed<T, N>(from));
}

template <int N, class T>
DENDRITE_DEVICE void store_floats(T* to, const float (&values)[N]) {
  store_packed<T, N>(to, pack<T, N>(values));
}

}  // namespace dendrite
