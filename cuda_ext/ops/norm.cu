#include "dendrite/norm.cuh"
#include "launch.h"
#include "norm.h"

namespace dendrite {
namespace {

int divide_up(int value, int by) {
  return (value + by - 1) / by;
}

template <class T, int kItems>
void launch(const NormParams& params, int num_rows, cudaStream_t stream) {
  const int threads = divide_up(params.width, kNormVector * kItems * kWarpSize) * kWarpSize;
  launch_kernel(add_rms_norm_kernel<T, kItems>, dim3(num_rows), dim3(threads),
                threads / kWarpSize * sizeof(float), stream, true, params);
}

}  // namespace

bool norm_takes_width(int width) {
  return width > 0 && width % kNormVector == 0 && width <= kMaxNormWidth;
}

// The shape of the block follows the width alone: a row has the same bits in every batch.
void launch_add_rms_norm(const NormParams& params, int num_rows, Dtype dtype, cudaStream_t stream) {
  if (num_rows == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int vectors = params.width / kNormVector;
    if (vectors <= 2 * kMaxNormThreads) return launch<T, 2>(params, num_rows, stream);
    if (vectors <= 4 * kMaxNormThreads) return launch<T, 4>(params, num_rows, stream);
    launch<T, kMaxNormItems>(params, num_rows, stream);
  });
}

}  // namespace dendrite
