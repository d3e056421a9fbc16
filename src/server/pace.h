#pragma once
// Whether a disk answers at once or makes its callers wait.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace qcow {

/// Tells quick requests from slow ones, by how long the last ones took. The thread that receives a quick request had
/// better perform it: to pass it on costs more, and wakes a processor up. Slow requests are for other threads, many at
/// once. Requests count as slow when one in eight is.
///
/// Thread safety: all functions may be called from any number of threads.
class Pace {
public:
    [[nodiscard]] bool is_slow() const { return score_.load(std::memory_order_relaxed) > threshold; }

    /// Performs a request of `bytes` bytes, and measures how long that takes.
    template <class F>
    auto timed(std::uint64_t bytes, F&& work) {
        const auto begin = Clock::now();
        auto result = work();
        record(Clock::now() - begin, bytes);
        return result;
    }

private:
    using Clock = std::chrono::steady_clock;

    void record(Clock::duration took, std::uint64_t bytes) {
        // A GB a second is slow where memory is what is read.
        const bool slow = took > std::chrono::microseconds(50) + std::chrono::nanoseconds(bytes);
        const int score = score_.load(std::memory_order_relaxed);
        const int next = std::clamp(score + (slow ? 8 : -1), 0, 2 * threshold);
        // Lost updates of other threads do not matter; most of the time there is nothing to write.
        if (next != score) score_.store(next, std::memory_order_relaxed);
    }

    static constexpr int threshold = 64;
    std::atomic<int> score_ = 0;
};

}  // namespace qcow
