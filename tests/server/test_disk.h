#pragma once
// A disk in memory that can be slow, stuck or broken.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <thread>
#include <vector>

#include "base/try.h"
#include "disk/range.h"
#include "qcow/disk.h"
#include "support/random.h"

namespace qcow::test {

class TestDisk final : public Disk {
public:
    static constexpr std::uint64_t block = 65536;

    explicit TestDisk(std::uint64_t size, std::uint64_t block_size = block)
        : bytes_(size), holes_(divide_up(size, block)), block_size_(block_size) {}

    [[nodiscard]] std::uint64_t size() const override { return bytes_.size(); }
    [[nodiscard]] std::uint64_t block_size() const override { return block_size_; }

    Result<void> do_read(GuestOffset at, std::span<std::byte> to) override {
        TRY_VOID(verify_range(*this, at, to.size()));
        TRY_VOID(enter(at, to.size()));
        ++reads;
        const std::shared_lock lock(mutex_);
        std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(at.value), to.size(), to.begin());
        return {};
    }

    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        TRY_VOID(verify_range(*this, at, 1));
        const std::shared_lock lock(mutex_);
        const auto first = at.value / block;
        auto last = first + 1;
        while (last < holes_.size() && holes_[last] == holes_[first]) ++last;
        Extent extent;
        extent.start = at;
        extent.length = std::min({limit, last * block - at.value, size() - at.value});
        extent.kind = holes_[first] ? Extent::Kind::unallocated : Extent::Kind::data;
        extent.depth = first % 2;
        return extent;
    }

    Result<void> do_write(GuestOffset at, std::span<const std::byte> from) override {
        TRY_VOID(verify_range(*this, at, from.size()));
        TRY_VOID(enter(at, from.size()));
        ++writes;
        const std::unique_lock lock(mutex_);
        std::ranges::copy(from, bytes_.begin() + static_cast<std::ptrdiff_t>(at.value));
        for (auto i = at.value / block; i * block < at.value + from.size(); ++i) holes_[i] = false;
        return {};
    }

    Result<void> do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes) override {
        TRY_VOID(verify_range(*this, at, length));
        ++(zeroes == Zeroes::keep ? kept : released);
        const std::unique_lock lock(mutex_);
        std::fill_n(bytes_.begin() + static_cast<std::ptrdiff_t>(at.value), length, std::byte{0});
        return {};
    }

    Result<void> do_discard(GuestOffset at, std::uint64_t length) override {
        TRY_VOID(verify_range(*this, at, length));
        ++discards;
        return {};
    }

    Result<void> do_flush() override {
        ++flushes;
        if (flush_fails) return fail(Errc::no_space, "disk", "full");
        return {};
    }

    /// Fills it with random bytes, all data.
    void fill(Random& random) {
        for (std::size_t at = 0; at < bytes_.size(); at += block) {
            const auto piece = random.bytes(std::min<std::size_t>(block, bytes_.size() - at));
            std::ranges::copy(as_bytes(piece), bytes_.begin() + static_cast<std::ptrdiff_t>(at));
        }
    }

    /// Makes the block at `at` a hole.
    void punch(std::uint64_t at) {
        holes_[at / block] = true;
        std::fill_n(bytes_.begin() + static_cast<std::ptrdiff_t>(at), block, std::byte{0});
    }

    /// From now on requests wait until open() is called.
    void close() { closed_ = true; }
    void open() {
        {
            const std::lock_guard lock(gate_mutex_);
            closed_ = false;
        }
        gate_.notify_all();
    }

    /// The contents.
    [[nodiscard]] std::span<std::byte> bytes() { return bytes_; }

    std::atomic<unsigned> reads = 0, writes = 0, kept = 0, released = 0, discards = 0, flushes = 0;
    std::atomic<unsigned> inside = 0, most_inside = 0;  ///< requests in the disk, now and at most
    std::atomic<bool> flush_fails = false;
    std::atomic<std::uint64_t> bad_sector = ~std::uint64_t{0};  ///< whatever touches it fails
    std::atomic<std::uint64_t> slow_sector = ~std::uint64_t{0};
    std::atomic<unsigned> delay_microseconds = 0;

    [[nodiscard]] Result<void> verify_writable() const override { return {}; }

private:
    Result<void> enter(GuestOffset at, std::uint64_t length) {
        const auto now = ++inside;
        for (auto most = most_inside.load(); now > most && !most_inside.compare_exchange_weak(most, now);) {
        }
        const auto covers = [&](std::uint64_t sector) { return at.value <= sector && sector < at.value + length; };
        if (delay_microseconds > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay_microseconds));
        if (covers(slow_sector)) std::this_thread::sleep_for(std::chrono::milliseconds(300));
        if (closed_) {
            std::unique_lock lock(gate_mutex_);
            gate_.wait(lock, [&] { return !closed_; });
        }
        --inside;
        if (covers(bad_sector)) return fail(Errc::io, "disk", "a bad sector");
        return {};
    }

    mutable std::shared_mutex mutex_;
    std::vector<std::byte> bytes_;
    std::vector<bool> holes_;
    std::uint64_t block_size_;
    std::mutex gate_mutex_;
    std::condition_variable gate_;
    std::atomic<bool> closed_ = false;
};

}  // namespace qcow::test
