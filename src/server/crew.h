#pragma once
// Threads that do what one connection or queue has to wait for.

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace qcow {

/// Runs tasks on threads, which start as they are needed. A weight in bytes bounds what the tasks hold at once.
///
/// Thread safety: one thread calls reserve, submit and finish; the others are for any.
class Crew {
public:
    /// Runs once, and throws nothing.
    using Task = std::move_only_function<void()>;

    /// At most `max_threads` threads; tasks that hold at most `max_bytes` bytes in all.
    Crew(unsigned max_threads, std::uint64_t max_bytes) : max_threads_(max_threads), max_bytes_(max_bytes) {}
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;
    ~Crew() { finish(); }

    /// Whether it may have threads at all.
    [[nodiscard]] bool exists() const { return max_threads_ > 0; }

    /// Whether no task waits or runs.
    [[nodiscard]] bool is_idle() const { return in_flight_ == 0; }

    /// Waits until tasks may hold `bytes` more, or until no task holds anything.
    void reserve(std::uint64_t bytes);

    /// Queues a task. When it has run, it gives back the `bytes` that were reserved for it. If the system starts no
    /// thread and there is none yet, the caller's thread runs it.
    void submit(std::uint64_t bytes, Task task);

    /// Waits until all tasks have run, and ends the threads.
    void finish();

private:
    struct Job {
        std::uint64_t bytes = 0;
        Task task;
    };

    void work();

    const unsigned max_threads_;
    const std::uint64_t max_bytes_;
    std::mutex mutex_;
    std::condition_variable job_there_;
    std::condition_variable bytes_free_;
    std::deque<Job> jobs_;
    std::uint64_t bytes_ = 0;
    std::size_t idle_ = 0;
    std::atomic<std::size_t> in_flight_ = 0;
    bool over_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace qcow
