// A kernel that shows whether this library has code for the current device.
#include "launch.h"
#include "library.h"

namespace dendrite {
namespace {

DENDRITE_KERNEL probe_kernel(int* out) {
  *out = 1;
}

std::string trouble() {
#ifdef DENDRITE_EMULATE
  int one = 0;
  launch_kernel(probe_kernel, dim3(1), dim3(1), 0, nullptr, false, &one);
  return one == 1 ? "" : "the emulator doesn't run";
#else
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
#endif
}

}  // namespace
}  // namespace dendrite

const char* dendrite_trouble() {
  static thread_local std::string text;
  text = dendrite::trouble();
  return text.c_str();
}
