// The threads of an operator. Nobody waits for a thread that is not at work, nor long in a spin for one that is: on a
// busy machine a thread may stand still for milliseconds, and a core that spins beside it is one it cannot use.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

// Calls work here and on up to threads - 1 others, those that come while it goes on here; `over` says that to come is
// too late. Returns when it has returned everywhere, and throws what it threw.
void work_together(int64_t threads, const std::function<void()>& work, const std::function<bool()>& over);

// Waits until is_so(), which another thread that is at work will make true.
void wait_until(const std::function<bool()>& is_so);

// task(i, state) for i = 0 ... tasks - 1, begun in this order, so that a task may wait for an earlier one. Each thread
// makes one state and hands it to all its tasks, of which it takes one after another as it comes to them.
template <class Make, class Task>
void parallel_for(int64_t tasks, int threads, Make make_state, Task task) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        auto state = make_state();
        for (int64_t i; (i = next++) < tasks;) task(i, state);
    };
    if (tasks <= 1 || threads <= 1) return work();
    work_together(std::min<int64_t>(tasks, threads), work, [&] { return next >= tasks; });
}

template <class Task>
void parallel_for(int64_t tasks, int threads, Task task) {
    parallel_for(tasks, threads, [] { return 0; }, [&](int64_t i, int) { task(i); });
}
