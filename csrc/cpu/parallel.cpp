#include "parallel.h"

#ifndef _WIN32
#include <pthread.h>
#endif

#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// How long a thread looks for work, or for the end of others', before it sleeps: about twice what it takes to wake it.
constexpr std::chrono::microseconds patience{30};

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether is_so() came true before patience ended.
template <class F>
bool spin(F is_so) {
    const auto end = std::chrono::steady_clock::now() + patience;
    do {
        for (int i = 0; i < 16; ++i, pause())
            if (is_so()) return true;
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

struct Job {
    const std::function<void()>& work;
    const std::function<bool()>& over;
    int64_t room;  // for so many others
    std::atomic<int64_t> inside{0};
    std::exception_ptr error{};
};

// Threads that are kept, and share their time among all who call: never more of them than one caller asked for.
class Pool {
   public:
    void run(Job& job) {
        const int64_t wanted = job.room;  // others change it as soon as they see the job
        {
            const std::lock_guard lock(mutex);
            while (threads < wanted && start());
            jobs.push_back(&job), ++open;
        }
        for (int64_t i = std::min(wanted, sleepers.load()); i > 0; --i) came.notify_one();
        std::exception_ptr error;
        try {
            job.work();
        } catch (...) {
            error = std::current_exception();
        }
        {
            const std::lock_guard lock(mutex);
            if (job.room > 0) close(job);
        }
        if (!spin([&] { return job.inside == 0; })) {
            std::unique_lock lock(mutex);
            left.wait(lock, [&] { return job.inside == 0; });
        }
        const std::lock_guard lock(mutex);  // the last to leave has let go of the job
        if (error || job.error) std::rethrow_exception(error ? error : job.error);
    }

   private:
    bool start() try {
        std::thread([this] {
            for (;;) help(next());
        }).detach();
        return ++threads;
    } catch (const std::system_error&) {
        return false;  // as many threads as the system grants do the same
    }

    Job& next() {
        for (;;) {
            spin([&] { return open > 0; });
            std::unique_lock lock(mutex);
            ++sleepers;
            came.wait(lock, [&] { return open > 0; });
            --sleepers;
            Job& job = *jobs.front();
            ++job.inside;
            if (--job.room == 0) close(job);
            return job;
        }
    }

    void help(Job& job) {
        std::exception_ptr error;
        try {
            if (!job.over()) job.work();
        } catch (...) {
            error = std::current_exception();
        }
        const std::lock_guard lock(mutex);
        if (error) job.error = error;
        if (--job.inside == 0) left.notify_all();
    }

    void close(Job& job) { jobs.erase(std::find(jobs.begin(), jobs.end(), &job)), --open; }

    std::mutex mutex;
    std::condition_variable came, left;
    std::vector<Job*> jobs;  // that have room, the oldest first
    std::atomic<int64_t> open{0}, sleepers{0};
    int64_t threads = 0;
};

// Never destroyed, since its threads end with the process. They do not come along through a fork, so a child has a pool
// of its own.
Pool*& pool() {
    static Pool* threads = [] {
#ifndef _WIN32
        pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
#endif
        return new Pool;
    }();
    return threads;
}

}  // namespace

void work_together(int64_t threads, const std::function<void()>& work, const std::function<bool()>& over) {
    Job job{work, over, threads - 1};
    pool()->run(job);
}

void wait_until(const std::function<bool()>& is_so) {
    while (!spin(is_so)) std::this_thread::sleep_for(patience);
}
