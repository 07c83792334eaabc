// Arguments of the kernels that store, turn and copy packed vectors: plain C++, shared by kernels,
// launchers and bindings. T is the compute dtype.
#pragma once

#include "packed_layer.h"
#include "row_params.h"

namespace dendrite {

struct RopePackedParams {
  RopeParams rope;        // without pages
  PackedLayer layer;
  const float* k_signs;   // [kv_heads, dim] of the rotation of keys, or null
  const float* v_signs;   // the same of values
  const float* k_mean;    // [kv_heads, dim] subtracted from keys, or null
};

struct RotateParams {
  void* x;             // [rows, heads, dim] T, in place
  const float* signs;  // [kv_heads, dim]
  int rows, heads, kv_heads, dim;
};

struct CopyPackedParams {
  char* data;             // [pages, page_bytes]
  const int32_t* copies;  // [max_copies, 3] source page, destination page, used slots
  const int32_t* count;   // [1] copies that are there
  int64_t page_bytes;     // a multiple of 16
  int max_copies, pages;
};

}  // namespace dendrite
