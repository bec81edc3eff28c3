// The threads of an operator: libgomp, which torch has loaded already, or std::thread where a sanitizer must see them.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// task(i, state) for i = 0 ... tasks - 1, begun in this order, so that a task may wait for an earlier one. Each thread
// makes one state and hands it to all its tasks.
template <class Make, class Task>
void parallel_for(int64_t tasks, int threads, Make make_state, Task task) {
    if (tasks <= 1 || threads <= 1) {
        auto state = make_state();
        for (int64_t i = 0; i < tasks; ++i) task(i, state);
        return;
    }
#if defined(_OPENMP) && !defined(SPARC_FAST_STD_THREADS)
#pragma omp parallel num_threads(threads)
    {
        auto state = make_state();
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t i = 0; i < tasks; ++i) task(i, state);
    }
#else
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        auto state = make_state();
        for (int64_t i; (i = next++) < tasks;) task(i, state);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads && i < tasks; ++i) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
#endif
}

template <class Task>
void parallel_for(int64_t tasks, int threads, Task task) {
    parallel_for(tasks, threads, [] { return 0; }, [&](int64_t i, int) { task(i); });
}
