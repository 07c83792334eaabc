// Kernels compiled for avx2 (see CMakeLists.txt for the flags).
#include "kernels.h"

#if defined(__AVX2__)
#define DENDRITE_ISA avx2
#define DENDRITE_NAME "avx2"
#define DENDRITE_LEVEL 2
#include "attention_kernel.h"
#include "packed_attention.h"
#include "packed_store.h"
#include "row_kernels.h"

namespace dendrite {
const KernelTable* avx2_kernels() { return &avx2::kTable; }
}  // namespace dendrite
#else
namespace dendrite {
const KernelTable* avx2_kernels() { return nullptr; }
}  // namespace dendrite
#endif
