#include "server/nbd/crew.h"

#include <new>
#include <system_error>

namespace qcow::nbd {
namespace {

/// A task that has no data has a weight all the same, so that their number is bounded.
constexpr std::uint64_t min_weight = 16 << 10;

void perform(Crew::Task& task, Crew::Tools& tools) {
    try {
        task(tools);
        tools.replies.flush();
    } catch (const std::bad_alloc&) {
        tools.replies.hang_up();
    }
}

}  // namespace

Crew::Crew(unsigned max_threads, std::uint64_t max_bytes, std::function<Replies()> make_replies)
    : max_threads_(max_threads), max_bytes_(max_bytes), make_replies_(std::move(make_replies)) {}

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
            threads_.emplace_back([this, tools = std::make_unique<Tools>(make_replies_)] { work(*tools); });
            return;
        } catch (const std::system_error&) {
            // The system has no more threads. Those that there are do it; if there are none, the caller's.
            if (threads_.empty()) {
                auto job = std::move(jobs_.front());
                jobs_.pop_front();
                bytes_ -= job.bytes;
                lock.unlock();
                Tools tools(make_replies_);
                perform(job.task, tools);
                --in_flight_;
                return;
            }
        }
    }
    lock.unlock();
    job_there_.notify_one();
}

void Crew::work(Tools& tools) {
    std::unique_lock lock(mutex_);
    for (;;) {
        ++idle_;
        job_there_.wait(lock, [&] { return over_ || !jobs_.empty(); });
        --idle_;
        if (jobs_.empty()) return;
        auto job = std::move(jobs_.front());
        jobs_.pop_front();
        lock.unlock();
        perform(job.task, tools);
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

}  // namespace qcow::nbd
