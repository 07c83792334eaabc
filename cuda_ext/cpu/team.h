// A team of threads that runs one function on every member.
//
// torch's kernels run on an OpenMP team whose idle threads spin for a while. A second team on the same
// cores would fight with it, so the team here is torch's own whenever its runtime (libgomp, or LLVM/
// Intel OpenMP with the GOMP interface) is loaded in the process; otherwise std::thread is used.
#pragma once

#include <atomic>
#include <cstdint>

namespace dendrite {

// "torch's OpenMP (path)" or "std::thread (reason)".
const char* team_description();

using TeamFunction = void (*)(void* data, int thread);

// Runs function(data, t) for t = 0 .. threads-1, the caller being one of them; returns when all have.
void run_team(int threads, TeamFunction function, void* data);

// Calls body(unit, thread) for every unit in [0, units); units are handed out by an atomic counter.
template <class Body>
void parallel_units(int threads, int64_t units, Body&& body) {
  struct Job {
    Body* body;
    int64_t units;
    std::atomic<int64_t> next;
  };
  if (threads > units) threads = int(units);
  if (threads <= 1) {
    for (int64_t i = 0; i < units; ++i) body(i, 0);
    return;
  }
  Job job{&body, units, {0}};
  run_team(
      threads,
      [](void* data, int thread) {
        Job& j = *static_cast<Job*>(data);
        for (int64_t i; (i = j.next.fetch_add(1, std::memory_order_relaxed)) < j.units;)
          (*j.body)(i, thread);
      },
      &job);
}

// Rows [0, rows) in equal contiguous shares, one per thread; body(begin, end).
template <class Body>
void parallel_rows(int threads, int64_t rows, Body&& body) {
  if (threads > rows) threads = int(rows);
  if (threads <= 1) {
    if (rows > 0) body(int64_t(0), rows);
    return;
  }
  parallel_units(threads, threads, [&](int64_t share, int) {
    body(rows * share / threads, rows * (share + 1) / threads);
  });
}

}  // namespace dendrite
