#pragma once
// What several flushes of one open file have to do with each other.

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace qcow {

/// The system says only once that it could not write something: to one of those that flush meanwhile, whoever of them
/// wrote it. So a flush succeeds only when every other that it overlapped has; and after one that failed none does any
/// more, since what is lost then counts as written. Thread-safe.
class OverlappingFlushes {
public:
    /// `sync` gives 0 or the errno that it failed with; so does this.
    template <class Sync>
    int run(Sync&& sync) {
        std::unique_lock lock(mutex_);
        if (error_ != 0) return error_;
        Flight mine{.number = ++begun_, .earlier = newest_};
        (newest_ == nullptr ? oldest_ : newest_->later) = &mine;
        newest_ = &mine;
        lock.unlock();
        const int error = sync();
        lock.lock();
        (mine.earlier == nullptr ? oldest_ : mine.earlier->later) = mine.later;
        (mine.later == nullptr ? newest_ : mine.later->earlier) = mine.earlier;
        if (error_ == 0) error_ = error;
        left_.notify_all();
        const std::uint64_t last = begun_;
        left_.wait(lock, [&] { return oldest_ == nullptr || oldest_->number > last; });
        return error_;
    }

private:
    /// A call that the system has not answered yet; a list of them needs no memory.
    struct Flight {
        std::uint64_t number = 0;  // by when they began
        Flight* earlier = nullptr;
        Flight* later = nullptr;
    };

    std::mutex mutex_;
    std::condition_variable left_;
    std::uint64_t begun_ = 0;
    Flight* oldest_ = nullptr;
    Flight* newest_ = nullptr;
    int error_ = 0;  // of the first that failed
};

}  // namespace qcow
