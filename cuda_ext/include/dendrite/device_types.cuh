// Macros, storage types and the few functions that are the same under nvcc and in the emulator.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef DENDRITE_EMULATE
#include "../../emulator/cuda_names.h"
#define DENDRITE_KERNEL void
#define DENDRITE_DEVICE inline
#define DENDRITE_HOST_DEVICE inline
#else
#define DENDRITE_KERNEL __global__ void
#define DENDRITE_DEVICE __device__ __forceinline__
#define DENDRITE_HOST_DEVICE __host__ __device__ __forceinline__
#endif

namespace dendrite {

// Storage of two bytes; arithmetic is done in float.
struct alignas(2) bf16 {
  uint16_t bits;
};
struct alignas(2) half_t {
  uint16_t bits;
};

constexpr uint32_t kWarpSize = 32;

DENDRITE_HOST_DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
DENDRITE_HOST_DEVICE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace dendrite
