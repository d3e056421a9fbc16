#pragma once
// Callers that want the same work done share one run of it.

#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "qcow/error.h"

namespace qcow {

/// Thread-safe.
class GroupCommit {
public:
    /// Gives the result of a run of `work` that began after this call did: its own, or one that another caller runs.
    template <class Work>
    Result<void> run(Work&& work) {
        std::unique_lock lock(mutex_);
        const std::uint64_t wanted = begun_ + 1;
        while (finished_ < wanted) {
            if (running_) {
                done_.wait(lock);
                continue;
            }
            running_ = true;
            ++begun_;
            lock.unlock();
            auto result = work();
            lock.lock();
            running_ = false;
            finished_ = begun_;
            result_ = std::move(result);
            done_.notify_all();
        }
        // A later run than the wanted one covers it, too.
        return result_;
    }

private:
    std::mutex mutex_;
    std::condition_variable done_;
    std::uint64_t begun_ = 0;
    std::uint64_t finished_ = 0;
    bool running_ = false;
    Result<void> result_;
};

}  // namespace qcow
