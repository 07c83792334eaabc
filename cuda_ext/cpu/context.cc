#include "context.h"

#include <stdexcept>

namespace dendrite {
namespace {

struct Level {
  const KernelTable* kernels;
  bool runs_here;
};

std::vector<Level> levels() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
#else
  const bool avx2 = false, avx512 = false;
#endif
  return {{scalar_kernels(), true},
          {neon_kernels(), true},
          {avx2_kernels(), avx2},
          {avx512_kernels(), avx512}};
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.kernels != nullptr && level.runs_here) names.emplace_back(level.kernels->name);
  return names;
}

Context::Context(const std::string& isa, int count) : kernels(nullptr) {
  std::string known;
  for (const Level& level : levels()) {
    if (level.kernels == nullptr || !level.runs_here) continue;
    if (isa == "auto" || isa == level.kernels->name) kernels = level.kernels;
    known += known.empty() ? level.kernels->name : std::string(", ") + level.kernels->name;
  }
  if (kernels == nullptr)
    throw std::invalid_argument("isa '" + isa + "' can't run here; this machine has: auto, " + known);
  set_threads(count);
}

void Context::set_threads(int count) {
  if (count < 1)
    throw std::invalid_argument("threads must be >= 1, got " + std::to_string(count));
  threads = count;
  if (scratch.size() < size_t(count)) scratch = std::vector<ThreadScratch>(count);
}

}  // namespace dendrite
