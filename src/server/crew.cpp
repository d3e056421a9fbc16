#include "server/crew.h"

#include <algorithm>
#include <system_error>

namespace qcow {
namespace {

/// A task that has no data has a weight all the same, so that their number is bounded.
constexpr std::uint64_t min_weight = 16 << 10;

}  // namespace

void Crew::reserve(std::uint64_t bytes) {
    bytes = std::max(bytes, min_weight);
    std::unique_lock lock(mutex_);
    bytes_free_.wait(lock, [&] { return bytes_ == 0 || bytes_ + bytes <= max_bytes_; });
    bytes_ += bytes;
}

void Crew::submit(std::uint64_t bytes, Task task) {
    ++in_flight_;
    std::unique_lock lock(mutex_);
    jobs_.push_back({std::max(bytes, min_weight), std::move(task)});
    if (idle_ < jobs_.size() && threads_.size() < max_threads_) {
        try {
            threads_.emplace_back([this] { work(); });
            return;
        } catch (const std::system_error&) {
            // The system has no more threads. Those that there are run the task; if there are none, the caller's does.
            if (threads_.empty()) {
                auto job = std::move(jobs_.front());
                jobs_.pop_front();
                bytes_ -= job.bytes;
                lock.unlock();
                job.task();
                --in_flight_;
                return;
            }
        }
    }
    lock.unlock();
    job_there_.notify_one();
}

void Crew::work() {
    std::unique_lock lock(mutex_);
    for (;;) {
        ++idle_;
        job_there_.wait(lock, [&] { return over_ || !jobs_.empty(); });
        --idle_;
        if (jobs_.empty()) return;
        auto job = std::move(jobs_.front());
        jobs_.pop_front();
        lock.unlock();
        job.task();
        job.task = nullptr;
        --in_flight_;
        lock.lock();
        bytes_ -= job.bytes;
        bytes_free_.notify_one();
    }
}

void Crew::finish() {
    {
        const std::lock_guard lock(mutex_);
        over_ = true;
    }
    job_there_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
}

}  // namespace qcow
