// Kernels compiled for neon (see CMakeLists.txt for the flags).
#include "kernels.h"

#if defined(__aarch64__)
#define DENDRITE_ISA neon
#define DENDRITE_NAME "neon"
#define DENDRITE_LEVEL 1
#include "attention_kernel.h"
#include "packed_attention.h"
#include "packed_store.h"
#include "row_kernels.h"

namespace dendrite {
const KernelTable* neon_kernels() { return &neon::kTable; }
}  // namespace dendrite
#else
namespace dendrite {
const KernelTable* neon_kernels() { return nullptr; }
}  // namespace dendrite
#endif
