#pragma once
// A gate that requests pass, and that can be closed between two of them.

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "base/stripes.h"

namespace qcow {

/// Requests pass an open gate and count as running until they are done. Closing it lets no more in and waits for those
/// that run. Thread safety: all functions may be called from any number of threads; close() and open() by one at a
/// time.
class RequestGate {
public:
    /// A request that runs. The construction waits while the gate is closed.
    class Pass {
    public:
        explicit Pass(RequestGate& gate) : gate_(gate), running_(gate.enter()) {}
        Pass(const Pass&) = delete;
        Pass& operator=(const Pass&) = delete;
        ~Pass() { gate_.leave(running_); }

    private:
        RequestGate& gate_;
        std::atomic<std::uint64_t>& running_;
    };

    /// Closes the gate. Returns whether no request runs any more; where one still does after `timeout`, the gate is
    /// open again.
    [[nodiscard]] bool close(std::chrono::nanoseconds timeout) {
        std::unique_lock lock(mutex_);
        closed_ = true;
        if (changed_.wait_for(lock, timeout, [this] { return is_idle(); })) return true;
        closed_ = false;
        changed_.notify_all();
        return false;
    }

    void open() {
        {
            const std::lock_guard lock(mutex_);
            closed_ = false;
        }
        changed_.notify_all();
    }

private:
    struct alignas(64) Stripe {
        std::atomic<std::uint64_t> running = 0;
    };

    [[nodiscard]] bool is_idle() const {
        for (const auto& stripe : stripes_) {
            if (stripe.running.load() != 0) return false;
        }
        return true;
    }

    std::atomic<std::uint64_t>& enter() {
        auto& running = stripes_[stripe_of_thread()].running;
        for (;;) {
            running.fetch_add(1);
            if (!closed_.load()) return running;
            leave(running);
            std::unique_lock lock(mutex_);
            changed_.wait(lock, [this] { return !closed_.load(); });
        }
    }

    void leave(std::atomic<std::uint64_t>& running) {
        if (running.fetch_sub(1) == 1 && closed_.load()) {
            {
                const std::lock_guard lock(mutex_);
            }
            changed_.notify_all();
        }
    }

    std::array<Stripe, stripe_count> stripes_;
    std::atomic<bool> closed_ = false;
    std::mutex mutex_;
    std::condition_variable changed_;
};

}  // namespace qcow
