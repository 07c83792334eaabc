#include "team.h"

#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif

namespace dendrite {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string description;
};

#if defined(__linux__)
// Keeps the path of a loaded OpenMP runtime; one from torch's own folder wins.
int visit_library(dl_phdr_info* info, size_t, void* data) {
  const char* path = info->dlpi_name;
  const char* file = std::strrchr(path, '/');
  file = file == nullptr ? path : file + 1;
  const bool openmp = std::strncmp(file, "libgomp", 7) == 0 ||
                      std::strncmp(file, "libiomp5", 8) == 0 ||
                      std::strncmp(file, "libomp", 6) == 0;
  if (!openmp) return 0;
  auto& found = *static_cast<std::string*>(data);
  if (found.empty() || std::strstr(path, "/torch") != nullptr) found = path;
  return 0;
}

Runtime find_runtime() {
  Runtime runtime;
  std::string path;
  dl_iterate_phdr(visit_library, &path);
  if (path.empty()) {
    runtime.description = "std::thread (no OpenMP runtime is loaded; import torch first)";
    return runtime;
  }
  void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (handle != nullptr)
    runtime.parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
  runtime.description = runtime.parallel != nullptr
                            ? "OpenMP (" + path + ")"
                            : "std::thread (" + path + " has no GOMP_parallel)";
  return runtime;
}
#else
Runtime find_runtime() { return {nullptr, "std::thread (no GOMP interface on this system)"}; }
#endif

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

struct TeamJob {
  TeamFunction function;
  void* data;
  std::atomic<int> next;
};

void enter_team(void* pointer) {
  TeamJob& job = *static_cast<TeamJob*>(pointer);
  job.function(job.data, job.next.fetch_add(1, std::memory_order_relaxed));
}

}  // namespace

const char* team_description() { return runtime().description.c_str(); }

void run_team(int threads, TeamFunction function, void* data) {
  if (threads <= 1) return function(data, 0);
  if (const GompParallel parallel = runtime().parallel) {
    TeamJob job{function, data, {0}};
    parallel(enter_team, &job, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  for (int t = 1; t < threads; ++t) others.emplace_back(function, data, t);
  function(data, 0);
  for (std::thread& other : others) other.join();
}

}  // namespace dendrite
