// What bindings_*.cc share: checks of an op's tensors, and registration by torch's stable ABI.
//
//   void silu_mul(const Tensor& gate_up, const Tensor& out) {
//     Call call("silu_mul");
//     const Argument result = call.floats("out", out, {kAny, kAny});
//     const int rows = result.size(0), width = result.size(1);
//     const Argument input = call.floats("gate_up", gate_up, {rows, 2 * width}, result.dtype());
//     ...
//     launch_silu_mul(args, call.stream());
//   }
//   DENDRITE_OPS(m) { m.impl("silu_mul", TORCH_BOX(&silu_mul)); }
//
// Every mistake is a std::runtime_error (RuntimeError in Python) that names the op and the
// argument.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtype.h"

// Two libraries are made of the same sources: the CUDA kernels, and the same kernels on the CPU.
#ifdef DENDRITE_EMULATE
#define DENDRITE_OPS(m) STABLE_TORCH_LIBRARY_IMPL(dendrite_emulated, CPU, m)
#else
#define DENDRITE_OPS(m) STABLE_TORCH_LIBRARY_IMPL(dendrite, CUDA, m)
// Weak: a torch without CUDA lacks it, and the library must still load there to be tested.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace dendrite {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;  // in a shape: every size will do

// A tensor that passed its checks.
class Argument {
 public:
  Argument(void* data, ScalarType type, torch::headeronly::IntHeaderOnlyArrayRef sizes)
      : data_(data), type_(type), sizes_(sizes) {}

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  void* data() const { return data_; }
  int size(size_t dim) const { return static_cast<int>(sizes_[dim]); }
  Dtype dtype() const {
    return type_ == ScalarType::Float  ? Dtype::kF32
           : type_ == ScalarType::Half ? Dtype::kF16
                                       : Dtype::kBF16;
  }

 private:
  void* data_;
  ScalarType type_;
  torch::headeronly::IntHeaderOnlyArrayRef sizes_;
};

// The checks of one call. Its tensors have to be contiguous and on one device, which is the current
// one as long as this object lives.
class Call {
 public:
  using Shape = std::initializer_list<int64_t>;

  explicit Call(const char* op) : op_(op) {}

  // fp32, fp16 or bf16, at an address that is a multiple of 16 (of the element, when `aligned` is
  // false).
  Argument floats(const char* name, const Tensor& tensor, Shape shape, bool aligned = true) {
    const ScalarType type = tensor.scalar_type();
    if (type != ScalarType::Float && type != ScalarType::Half && type != ScalarType::BFloat16)
      refuse(name, "must be fp32, fp16 or bf16, got ", torch::headeronly::toString(type));
    return checked(name, tensor, shape, type, aligned ? 16 : 1);
  }
  Argument floats(const char* name, const Tensor& tensor, Shape shape, Dtype dtype,
                  bool aligned = true) {
    return typed(name, tensor, shape, scalar_type(dtype), aligned);
  }
  Argument ints(const char* name, const Tensor& tensor, Shape shape, bool aligned = false) {
    return typed(name, tensor, shape, ScalarType::Int, aligned);
  }
  Argument typed(const char* name, const Tensor& tensor, Shape shape, ScalarType wanted,
                 bool aligned = false) {
    const ScalarType type = tensor.scalar_type();
    if (type != wanted)
      refuse(name, "must be ", torch::headeronly::toString(wanted), ", got ",
             torch::headeronly::toString(type));
    return checked(name, tensor, shape, type, aligned ? 16 : 1);
  }

  template <class... Parts>
  void require(bool holds, const char* name, const Parts&... parts) const {
    if (!holds) refuse(name, parts...);
  }

  template <class... Parts>
  [[noreturn]] void refuse(const char* name, const Parts&... parts) const {
    std::ostringstream text;
    text << op_ << ": " << name << ' ';
    (text << ... << parts);
    throw std::runtime_error(text.str());
  }

  // The current stream of the tensors' device.
  cudaStream_t stream() const {
#ifdef DENDRITE_EMULATE
    return nullptr;
#else
    void* stream = nullptr;
    if (!aoti_torch_get_current_cuda_stream ||
        aoti_torch_get_current_cuda_stream(device_, &stream) != 0)
      throw std::runtime_error(std::string(op_) + ": torch gives no CUDA stream");
    return static_cast<cudaStream_t>(stream);
#endif
  }

 private:
  static ScalarType scalar_type(Dtype dtype) {
    return dtype == Dtype::kF32   ? ScalarType::Float
           : dtype == Dtype::kF16 ? ScalarType::Half
                                  : ScalarType::BFloat16;
  }

  Argument checked(const char* name, const Tensor& tensor, Shape shape, ScalarType type,
                   uintptr_t alignment) {
    const auto sizes = tensor.sizes();
    bool same = sizes.size() == shape.size();
    for (size_t i = 0; same && i < shape.size(); ++i) {
      const int64_t wanted = shape.begin()[i];
      same =
          (wanted == kAny || wanted == sizes[i]) && sizes[i] <= std::numeric_limits<int32_t>::max();
    }
    if (!same) refuse(name, "must have the shape ", list(shape), ", got ", list(sizes));
    if (!tensor.is_contiguous()) refuse(name, "must be contiguous");
    check_device(name, tensor);
    void* data = tensor.data_ptr();
    if (reinterpret_cast<uintptr_t>(data) % alignment != 0)
      refuse(name, "must start at a multiple of ", alignment, " bytes");
    return {data, type, sizes};
  }

  void check_device(const char* name, const Tensor& tensor) {
    const int32_t index = tensor.get_device_index();
#ifdef DENDRITE_EMULATE
    if (!tensor.is_cpu()) refuse(name, "must be in host memory");
#else
    if (!tensor.is_cuda()) refuse(name, "must be on a CUDA device");
#endif
    if (first_ == nullptr) {
      first_ = name;
      device_ = index;
#ifndef DENDRITE_EMULATE
      if (torch::stable::accelerator::getCurrentDeviceIndex() != index) guard_.emplace(index);
#endif
    } else if (index != device_) {
      refuse(name, "is on device ", index, ", ", first_, " is on device ", device_);
    }
  }

  template <class Sizes>
  static std::string list(const Sizes& sizes) {
    std::ostringstream text;
    text << '[';
    const char* comma = "";
    for (const int64_t size : sizes) {
      text << comma;
      if (size == kAny)
        text << '*';
      else
        text << size;
      comma = ", ";
    }
    text << ']';
    return text.str();
  }

  const char* op_;
  const char* first_ = nullptr;  // the argument that decided the device
  int32_t device_ = 0;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace dendrite
