// Kernels compiled for avx512 (see CMakeLists.txt for the flags).
#include "kernels.h"

#if defined(__AVX512F__)
#define DENDRITE_ISA avx512
#define DENDRITE_NAME "avx512"
#define DENDRITE_LEVEL 3
#include "attention_kernel.h"
#include "packed_attention.h"
#include "packed_store.h"
#include "row_kernels.h"

namespace dendrite {
const KernelTable* avx512_kernels() { return &avx512::kTable; }
}  // namespace dendrite
#else
namespace dendrite {
const KernelTable* avx512_kernels() { return nullptr; }
}  // namespace dendrite
#endif
