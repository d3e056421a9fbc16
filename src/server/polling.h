#pragma once
// Whether to look for work for a while before sleeping.

#include <chrono>

namespace qcow {

/// Looking pays while work comes soon, as it did the last time. Else the thread sleeps at once, and costs nothing.
///
/// Thread safety: for one thread.
class Polling {
public:
    using Duration = std::chrono::steady_clock::duration;

    explicit Polling(Duration limit) : limit_(limit), pays_(limit > Duration::zero()) {}

    [[nodiscard]] bool pays() const { return pays_; }
    [[nodiscard]] Duration limit() const { return limit_; }

    /// Work has come after so long, in which the thread looked or slept.
    void came_after(Duration idle) { pays_ = limit_ > Duration::zero() && idle < limit_ + wake_up; }

private:
    /// How late a thread comes that sleeps, about: work that it finds then might have been there within the limit.
    static constexpr Duration wake_up = std::chrono::microseconds(100);

    Duration limit_;
    bool pays_;
};

}  // namespace qcow
