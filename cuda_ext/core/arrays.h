// Array arguments and results of the bindings.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>
#include <vector>

namespace dendrite {

namespace nb = nanobind;

template <class T>
constexpr const char* kDtype = nullptr;
template <>
inline constexpr const char* kDtype<int32_t> = "int32";
template <>
inline constexpr const char* kDtype<int64_t> = "int64";
template <>
inline constexpr const char* kDtype<float> = "float32";

// A 1-d array argument. Arrays of the right type pass without a copy; anything else goes through
// dendrite_engine.cache.arguments, which raises InvalidArgument for what can't be converted.
template <class T>
class ArrayArg {
 public:
  ArrayArg(nb::handle value, const char* name) {
    if (nb::try_cast(value, array_, false)) return;
    nb::object convert =
        nb::module_::import_("dendrite_engine.cache.arguments").attr("as_array");
    array_ = nb::cast<Array>(convert(name, value, kDtype<T>));
  }

  const T* data() const { return array_.data(); }
  size_t size() const { return array_.size(); }

 private:
  using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  Array array_;
};

template <class T>
using NumpyArray = nb::ndarray<nb::numpy, T, nb::ndim<1>>;

// Hands a vector to numpy without a copy.
template <class T>
NumpyArray<T> to_numpy(std::vector<T>&& values) {
  auto* owned = new std::vector<T>(std::move(values));
  if (owned->empty()) owned->reserve(1);  // a null pointer is no array
  nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return NumpyArray<T>(owned->data(), {owned->size()}, owner);
}

}  // namespace dendrite
