#pragma once
// A Storage whose operations can be stopped in their tracks, or slowed down at random.

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <shared_mutex>
#include <thread>

#include "storage/pass_through.h"
#include "support/random.h"

namespace qcow::test {

/// Holds one chosen read or write back until it is told to let it go.
class HeldStorage final : public PassThrough {
public:
    enum class Operation : std::uint8_t { read, write };
    using Choice = std::function<bool(Operation, HostOffset at, std::uint64_t length)>;

    using PassThrough::PassThrough;

    /// The next operation that `choice` chooses is held before it does anything.
    void hold(Choice choice) {
        const std::lock_guard lock(mutex_);
        choice_ = std::move(choice);
        state_ = State::waiting;
    }

    /// Waits until one is held; false if none comes in time.
    bool wait_until_held(std::chrono::milliseconds timeout = std::chrono::seconds(10)) {
        std::unique_lock lock(mutex_);
        return changed_.wait_for(lock, timeout, [&] { return state_ == State::held; });
    }

    void release() {
        const std::lock_guard lock(mutex_);
        choice_ = nullptr;
        state_ = State::idle;
        changed_.notify_all();
    }

    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        stop(Operation::read, at, to.size());
        return inner().read(at, to);
    }
    Result<void> write(HostOffset at, ConstBuffers from) override {
        stop(Operation::write, at, from.size());
        return inner().write(at, from);
    }

private:
    enum class State : std::uint8_t { idle, waiting, held };

    void stop(Operation operation, HostOffset at, std::uint64_t length) const {
        std::unique_lock lock(mutex_);
        if (state_ != State::waiting || !choice_(operation, at, length)) return;
        state_ = State::held;
        changed_.notify_all();
        changed_.wait(lock, [&] { return state_ != State::held; });
    }

    mutable std::mutex mutex_;
    mutable std::condition_variable changed_;
    mutable State state_ = State::idle;
    Choice choice_;
};

/// Whole operations exclude each other, so that what is written at once does not mix within a sector, as on real disks;
/// before and after them threads lose their turn now and then.
class NoisyStorage final : public PassThrough {
public:
    using PassThrough::PassThrough;

    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        const Noise noise;
        const std::shared_lock lock(mutex_);
        return inner().read(at, to);
    }
    Result<void> write(HostOffset at, ConstBuffers from) override {
        const Noise noise;
        const std::lock_guard lock(mutex_);
        return inner().write(at, from);
    }
    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override {
        const Noise noise;
        const std::lock_guard lock(mutex_);
        return inner().write_zeroes(at, length);
    }
    Result<void> allocate(HostOffset at, std::uint64_t length) override {
        const Noise noise;
        const std::lock_guard lock(mutex_);
        return inner().allocate(at, length);
    }
    Result<void> resize(std::uint64_t size) override {
        const std::lock_guard lock(mutex_);
        return inner().resize(size);
    }
    Result<void> flush() override {
        const Noise noise;
        return inner().flush();
    }

private:
    class Noise {
    public:
        Noise() { make(); }
        Noise(const Noise&) = delete;
        Noise& operator=(const Noise&) = delete;
        ~Noise() { make(); }

    private:
        static void make() {
            thread_local Random random(std::hash<std::thread::id>{}(std::this_thread::get_id()));
            if (random.chance(10)) std::this_thread::yield();
            if (random.chance(1)) std::this_thread::sleep_for(std::chrono::microseconds(random.below(200)));
        }
    };

    mutable std::shared_mutex mutex_;
};

}  // namespace qcow::test
