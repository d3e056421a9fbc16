#pragma once
// Whether a disk answers at once or makes its callers wait.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace qcow::nbd {

/// What is quick is best done by the thread that received it: passing it on costs more than doing it, and wakes a
/// processor up. What is slow is done by others, many at once. Which of the two it is, is seen from how long the last
/// requests took: one in eight that is slow tips the scales. Thread-safe.
class Pace {
public:
    [[nodiscard]] bool is_slow() const { return score_.load(std::memory_order_relaxed) > threshold; }

    /// Does something that has to do with `bytes` bytes, and takes its time.
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

}  // namespace qcow::nbd
