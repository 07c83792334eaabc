// How launchers start kernels: launch_kernel(kernel, grid, block, smem, stream, pdl, args...), the
// size of the device, and the choice of a type by its tag. Works under nvcc and in the emulator.
#pragma once

#include <stdexcept>
#include <string>

#include "../include/dendrite/device.cuh"
#include "dtype.h"

#ifdef DENDRITE_EMULATE
#include "../emulator/launch.h"
#else
#include "launch_cuda.h"
#endif

namespace dendrite {

// Calls function(T()) with the type that `dtype` names: float, half_t or bf16.
template <class Function>
void with_type(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::kF32:
      return function(float());
    case Dtype::kF16:
      return function(half_t());
    case Dtype::kBF16:
      return function(bf16());
  }
  throw std::invalid_argument("unknown Dtype " + std::to_string(int(dtype)));
}

}  // namespace dendrite
