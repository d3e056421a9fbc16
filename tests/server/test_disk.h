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

    Result<void> do_read(GuestOffset at, Buffers to) override;

    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override;

    Result<void> do_write(GuestOffset at, ConstBuffers from) override;

    Result<void> do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes) override;

    Result<void> do_discard(GuestOffset at, std::uint64_t length) override;

    Result<void> do_flush() override;

    /// Fills it with random bytes, all data.
    void fill(Random& random);

    /// Makes the block at `at` a hole.
    void punch(std::uint64_t at);

    /// From now on requests wait until open() is called.
    void close() { closed_ = true; }
    void open();

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
    Result<void> enter(GuestOffset at, std::uint64_t length);

    mutable std::shared_mutex mutex_;
    std::vector<std::byte> bytes_;
    std::vector<bool> holes_;
    std::uint64_t block_size_;
    std::mutex gate_mutex_;
    std::condition_variable gate_;
    std::atomic<bool> closed_ = false;
};

}  // namespace qcow::test
