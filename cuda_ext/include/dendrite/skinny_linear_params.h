// Arguments of the skinny_linear kernel, and how the work is cut: plain C++, shared by kernels,
// launcher and bindings.
#pragma once

#include <cstdint>

namespace dendrite {

// How a product is cut into blocks. It decides speed only: every plan gives the same bits.
struct SkinnyPlan {
  int tiles;   // MMA tiles of 16 weight rows that a warp multiplies at a time, 1 or 2
  int tile;    // columns of out that a block computes at a time, in a round
  int rounds;  // rounds of a block
  int blocks;  // blocks along the columns of out
  int ahead;   // weight rows that a block asks into L2 before the kernel ahead has ended
};

struct SkinnyParams {
  const void* x;       // [rows, inputs] T
  const void* weight;  // [columns, inputs] T; gated: [2 * columns, inputs], gates before ups
  const void* bias;    // [columns] T, or null; gated: null
  void* out;           // [rows, columns] Out
  int rows, columns;
  int inputs;  // a multiple of 8
  SkinnyPlan plan;
};

constexpr int kSkinnyMaxRows = 16;
constexpr int kSkinnyThreads = 256;
constexpr int kSkinnyWarps = kSkinnyThreads / 32;

// The order of every sum. Inputs are cut into blocks of 64, blocks into 8 slices, at places that
// depend on the number of inputs alone. A slice is one chain of MMAs, ascending; then
//   out = ((p0 + p1) + p2) + p3  with  p0 = s0 + s1, p1 = s2 + s3, ...
constexpr int kSkinnySlices = 8;
constexpr int kSkinnyBlock = 64;  // inputs
constexpr int kSkinnyChunk = 32;  // inputs that a warp multiplies at a time: 8 in each of 4 lanes

}  // namespace dendrite
