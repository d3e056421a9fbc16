#pragma once
// Counters that many threads change: each thread has one of a few, so that threads seldom share a cache line.

#include <atomic>
#include <cstddef>

namespace qcow {

inline constexpr std::size_t stripe_count = 16;

/// The stripe of the calling thread, below stripe_count. It never changes.
inline std::size_t stripe_of_thread() {
    static std::atomic<std::size_t> threads = 0;
    thread_local const std::size_t stripe = threads++ % stripe_count;
    return stripe;
}

}  // namespace qcow
