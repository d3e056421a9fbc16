#pragma once
// Callers that want the same work done share runs of it.

#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "qcow/error.h"

namespace qcow {

/// A run that waits for a disk does not keep the next one from beginning: up to `at_once` of them overlap, and who
/// comes when that many do shares one that begins later. Thread-safe.
class GroupCommit {
public:
    explicit GroupCommit(unsigned at_once) : at_once_(at_once) {}

    /// Gives the result of a run of `work` that began after this call did: its own, or one that another caller runs.
    template <class Work>
    Result<void> run(Work&& work) {
        std::unique_lock lock(mutex_);
        const std::uint64_t wanted = begun_ + 1;
        while (finished_ < wanted) {
            if (begun_ >= wanted || running_ == at_once_) {
                done_.wait(lock);
                continue;
            }
            const std::uint64_t mine = ++begun_;
            ++running_;
            lock.unlock();
            auto result = work();
            lock.lock();
            --running_;
            if (mine > finished_) {
                finished_ = mine;
                result_ = std::move(result);
            }
            done_.notify_all();
        }
        // A later run than the wanted one covers it, too.
        return result_;
    }

private:
    const unsigned at_once_;
    std::mutex mutex_;
    std::condition_variable done_;
    std::uint64_t begun_ = 0;
    std::uint64_t finished_ = 0;  // the latest to begin of those that are done
    unsigned running_ = 0;
    Result<void> result_;  // of that one
};

}  // namespace qcow
