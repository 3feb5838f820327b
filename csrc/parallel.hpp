// Threads. Tasks are handed out one by one, because their lengths differ.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastguide {

#ifdef _OPENMP
constexpr bool has_openmp = true;
#else
constexpr bool has_openmp = false;
#endif

// Calls body(task, thread) for every task below `tasks`; it must not throw. Which thread runs
// a task is open, so what a task writes may depend on the task alone.
template <typename Body>
void parallel_for(int threads, std::int64_t tasks, const Body& body) {
  [[maybe_unused]] const int team = static_cast<int>(std::min<std::int64_t>(threads, tasks));
#ifdef _OPENMP
  if (team > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(team)
    for (std::int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
    return;
  }
#endif
  for (std::int64_t task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace fastguide
