// How vectors of packed pages are coded, on every device. Plain C++.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DENDRITE_EVERYWHERE __host__ __device__
#else
#define DENDRITE_EVERYWHERE
#endif

namespace dendrite {

enum PackedCodec : int32_t { kFp32, kBf16, kFp16, kE4m3, kE5m2, kMxfp8, kTq4, kTq3, kTq2 };
constexpr int kPackedCodecs = 9;
constexpr int kCodecBits[kPackedCodecs] = {32, 16, 16, 8, 8, 8, 4, 3, 2};
constexpr int kScaleBytes[kPackedCodecs] = {0, 0, 0, 2, 0, 1, 2, 2, 2};

// Dimensions that share a scale, for heads of `dim`.
constexpr int scale_span(int codec, int dim) { return codec == kMxfp8 ? 32 : dim; }

// Lloyd-Max levels of a standard normal variable and the limits between them, positive halves
// (kernels: the levels of codes 2^(bits-1) and up); negative ones mirror them.
constexpr float kLevels4[8] = {0.128395f, 0.388048f, 0.656759f, 0.942340f,
                               1.256231f, 1.618046f, 2.069017f, 2.732590f};
constexpr float kLevels3[4] = {0.245094f, 0.756005f, 1.343909f, 2.151946f};
constexpr float kLevels2[2] = {0.452780f, 1.510418f};
constexpr float kLimits4[7] = {0.258222f, 0.522404f, 0.799550f, 1.099286f,
                               1.437139f, 1.843532f, 2.400803f};
constexpr float kLimits3[3] = {0.500550f, 1.049957f, 1.747927f};
constexpr float kLimits2[1] = {0.981599f};

// Their elements as constants of their own, which device code may name.
template <int kBits, int kPlace>
constexpr float kLevelAt = kBits == 4   ? kLevels4[kPlace]
                           : kBits == 3 ? kLevels3[kPlace & 3]
                                        : kLevels2[kPlace & 1];
template <int kBits, int kPlace>
constexpr float kLimitAt = kBits == 4   ? kLimits4[kPlace]
                           : kBits == 3 ? kLimits3[kPlace % 3]
                                        : kLimits2[0];

DENDRITE_EVERYWHERE constexpr bool is_plain_fp8(int codec) {
  return codec == kE4m3 || codec == kE5m2;
}
DENDRITE_EVERYWHERE constexpr bool is_rotated(int codec) { return codec >= kTq4; }

}  // namespace dendrite
