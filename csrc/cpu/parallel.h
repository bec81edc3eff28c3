// The threads of an operator: libgomp, which torch has loaded already, or std::thread where a sanitizer must see them.
#pragma once
#include <cstdint>

#if defined(_OPENMP) && !defined(SPARC_FAST_STD_THREADS)

template <class F>
void parallel_for(int64_t tasks, int threads, F task) {
    if (tasks <= 1 || threads <= 1) {
        for (int64_t i = 0; i < tasks; ++i) task(i);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < tasks; ++i) task(i);
}

#else
#include <atomic>
#include <thread>
#include <vector>

template <class F>
void parallel_for(int64_t tasks, int threads, F task) {
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t i; (i = next++) < tasks;) task(i);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads && i < tasks; ++i) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
}
#endif
