#pragma once
// What several flushes of one open file have to do with each other.

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <set>

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
        const std::uint64_t mine = ++begun_;
        in_flight_.insert(mine);
        lock.unlock();
        const int error = sync();
        lock.lock();
        in_flight_.erase(mine);
        if (error_ == 0) error_ = error;
        left_.notify_all();
        const std::uint64_t last = begun_;
        left_.wait(lock, [&] { return in_flight_.empty() || *in_flight_.begin() > last; });
        return error_;
    }

private:
    std::mutex mutex_;
    std::condition_variable left_;
    std::uint64_t begun_ = 0;
    std::set<std::uint64_t> in_flight_;  // by when they began
    int error_ = 0;                      // of the first that failed
};

}  // namespace qcow
