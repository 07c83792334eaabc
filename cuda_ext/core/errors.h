// Errors of the control plane. The bindings turn them into the classes of dendrite_engine.errors.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dendrite {

struct InvalidArgumentError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct EmptyPromptError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct StaleBranchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct IntegrityFault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The numbers are those of the moment before the call; the call changed nothing.
struct OutOfPagesError : std::exception {
  OutOfPagesError(int64_t need, int64_t free, int64_t cached, int64_t budget)
      : need(need), free(free), cached(cached), live(budget - free - cached), budget(budget) {}
  const char* what() const noexcept override { return "out of pages"; }
  int64_t need, free, cached, live, budget;
};

}  // namespace dendrite
