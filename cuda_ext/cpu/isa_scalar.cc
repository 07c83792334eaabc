// Kernels compiled for scalar (see CMakeLists.txt for the flags).
#include "kernels.h"

#if 1  // every machine
#define DENDRITE_ISA scalar
#define DENDRITE_NAME "scalar"
#define DENDRITE_LEVEL 0
#include "attention_kernel.h"
#include "packed_attention.h"
#include "packed_store.h"
#include "row_kernels.h"

namespace dendrite {
const KernelTable* scalar_kernels() { return &scalar::kTable; }
}  // namespace dendrite
#else
namespace dendrite {
const KernelTable* scalar_kernels() { return nullptr; }
}  // namespace dendrite
#endif
