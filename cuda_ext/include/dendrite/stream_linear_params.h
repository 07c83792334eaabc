// Arguments of the stream_linear kernel, and how the work is cut: plain C++, shared by kernel,
// launcher and bindings.
#pragma once

#include <cstdint>

namespace dendrite {

// How a product is cut into blocks. Where it does not say so, the numbers decide speed only.
struct StreamPlan {
  int groups;  // warpgroups of a block; each multiplies 64 rows of the weight
  int splits;  // blocks that share the inputs of a tile, a cluster; the order of the sums follows it
};

struct StreamParams {
  const void* bias;  // [columns] T, or null; gated: null
  void* out;         // [rows, columns] Out
  int rows, columns;
  int steps;  // panels of 64 inputs
  StreamPlan plan;
};

constexpr int kStreamMaxRows = 128;
constexpr int kStreamPanel = 64;     // inputs of a step, and weight rows of a warpgroup
constexpr int kStreamMaxSplits = 8;  // a cluster of more blocks is not portable

}  // namespace dendrite
