// What the test programs share: memory that kernels can reach, checks, and cases by name.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../../ops/launch.h"

namespace dendrite::test {

// `count` values, aligned to 256 bytes.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : count_(count) {
#ifdef DENDRITE_EMULATE
    data_ = static_cast<T*>(std::aligned_alloc(256, (count * sizeof(T) + 255) / 256 * 256));
#else
    check_cuda(cudaMallocManaged(&data_, count * sizeof(T)), "cudaMallocManaged");
#endif
    std::memset(static_cast<void*>(data_), 0, count * sizeof(T));
  }
  Array(const Array&) = delete;
  ~Array() {
#ifdef DENDRITE_EMULATE
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }
  operator T*() { return data_; }
  size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

inline void finish() {
#ifndef DENDRITE_EMULATE
  check_cuda(cudaDeviceSynchronize(), "kernel");
#endif
}

// Starts a kernel and waits for it.
template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), int grid, int block, size_t smem,
         Arguments&&... arguments) {
  launch_kernel(kernel, grid, block, smem, nullptr, false, std::forward<Arguments>(arguments)...);
  finish();
}

template <class A, class B>
void expect_equal(const A& got, const B& wanted, const std::string& what, long long index = 0) {
  if (got == wanted) return;
  std::ostringstream out;
  out.precision(9);
  out << what << "[" << index << "]: got " << got << ", wanted " << wanted;
  throw std::runtime_error(out.str());
}

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

using Cases = std::map<std::string, void (*)()>;

// Runs the cases named by the arguments; the first mistake ends the program with its message.
inline int run_cases(const Cases& cases, int count, char** names) {
  for (int i = 1; i < count; ++i) {
    const auto found = cases.find(names[i]);
    if (found == cases.end()) {
      std::fprintf(stderr, "no case %s\n", names[i]);
      return 2;
    }
    try {
      found->second();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", names[i], error.what());
      return 1;
    }
  }
  return 0;
}

}  // namespace dendrite::test
