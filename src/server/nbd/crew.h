#pragma once
// The threads that work for one connection.

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "server/nbd/commands.h"

namespace qcow::nbd {

/// Does tasks on threads that are started as they are needed. submit and finish are called by one thread.
class Crew {
public:
    /// What a thread has of its own.
    struct Tools {
        explicit Tools(const std::function<Replies()>& make_replies) : replies(make_replies()) {}
        Replies replies;
        KnownData known;
    };
    using Task = std::move_only_function<void(Tools&)>;

    /// `make_replies` is called by each thread once; at most `max_bytes` are in the hands of tasks.
    Crew(unsigned max_threads, std::uint64_t max_bytes, std::function<Replies()> make_replies);
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;
    ~Crew() { finish(); }

    /// Whether there are threads to be had.
    [[nodiscard]] bool exists() const { return max_threads_ > 0; }

    /// Whether it has nothing to do.
    [[nodiscard]] bool is_idle() const { return in_flight_ == 0; }

    /// Waits until `bytes` more may be in flight, or none are.
    void reserve(std::uint64_t bytes);

    /// Has the task done, which gives back the `bytes` that were reserved for it. If memory runs out in it, the
    /// connection ends.
    void submit(std::uint64_t bytes, Task task);

    /// Waits until everything is done.
    void finish();

private:
    void work(Tools& tools);

    unsigned max_threads_;
    std::uint64_t max_bytes_;
    std::function<Replies()> make_replies_;

    struct Job {
        std::uint64_t bytes = 0;
        Task task;
    };
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

}  // namespace qcow::nbd
