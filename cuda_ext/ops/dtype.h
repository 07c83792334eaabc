// Element types of tensors as launchers take them, and the stream type without CUDA's headers.
#pragma once

// As cuda_runtime_api.h declares it; saying it twice is allowed.
typedef struct CUstream_st* cudaStream_t;

namespace dendrite {

enum class Dtype { kF32, kF16, kBF16 };

constexpr int element_bytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

}  // namespace dendrite
