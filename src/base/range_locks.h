#pragma once
// Mutual exclusion for ranges of numbers: guest clusters whose mapping is being changed.

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace qcow {

/// Thread-safe. Holders of ranges that do not overlap do not wait for each other.
class RangeLocks {
    using Range = std::pair<std::uint64_t, std::uint64_t>;

public:
    /// Holds [begin, end) from its construction, which waits for it, to its destruction.
    class Guard {
    public:
        Guard(RangeLocks& locks, std::uint64_t begin, std::uint64_t end) : locks_(locks), range_(begin, end) {
            std::unique_lock lock(locks_.mutex_);
            locks_.released_.wait(lock, [&] { return locks_.is_free(range_); });
            locks_.held_.push_back(range_);
        }
        Guard(const Guard&) = delete;
        Guard& operator=(const Guard&) = delete;
        ~Guard() {
            {
                const std::lock_guard lock(locks_.mutex_);
                locks_.held_.erase(std::ranges::find(locks_.held_, range_));
            }
            locks_.released_.notify_all();
        }

    private:
        RangeLocks& locks_;
        Range range_;
    };

private:
    [[nodiscard]] bool is_free(const Range& range) const {
        return std::ranges::none_of(
            held_, [&](const Range& held) { return held.first < range.second && range.first < held.second; });
    }

    std::mutex mutex_;
    std::condition_variable released_;
    std::vector<Range> held_;
};

}  // namespace qcow
