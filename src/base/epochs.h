#pragma once
// When the last request that could have seen something is done.

#include <array>
#include <atomic>
#include <cstdint>

#include "base/stripes.h"

namespace qcow {

/// Requests enter and leave; what they may have seen is torn down two epochs after it was taken out of sight. (The
/// grace periods of read-copy-update.) Thread-safe; entering costs two atomic operations on a cache line that few
/// threads share.
class Epochs {
public:
    /// A request in flight.
    class Guard {
    public:
        explicit Guard(Epochs& epochs) : count_(&epochs.enter()) {}
        Guard(const Guard&) = delete;
        Guard& operator=(const Guard&) = delete;
        ~Guard() { count_->fetch_sub(1, std::memory_order_release); }

    private:
        std::atomic<std::uint64_t>* count_;
    };

    /// What was taken out of sight before this call is out of use once passed() is true of its result.
    [[nodiscard]] std::uint64_t now() const { return epoch_.load(); }
    [[nodiscard]] bool passed(std::uint64_t epoch) const { return epoch_.load() >= epoch + 2; }

    /// Begins a new epoch if no request of the one before the current is left. One thread at a time.
    bool advance() {
        const std::uint64_t current = epoch_.load();
        for (const auto& stripe : stripes_) {
            if (stripe.active[(current + 1) % 2].load() != 0) return false;
        }
        epoch_.store(current + 1);
        return true;
    }

private:
    struct alignas(64) Stripe {
        std::array<std::atomic<std::uint64_t>, 2> active = {};
    };
    std::atomic<std::uint64_t>& enter() {
        for (;;) {
            const std::uint64_t epoch = epoch_.load();
            auto& count = stripes_[stripe_of_thread()].active[epoch % 2];
            count.fetch_add(1);
            if (epoch_.load() == epoch) return count;
            count.fetch_sub(1);  // a new epoch has begun in between: this one may not be waited for any more
        }
    }

    std::atomic<std::uint64_t> epoch_ = 0;
    std::array<Stripe, stripe_count> stripes_;
};

}  // namespace qcow
