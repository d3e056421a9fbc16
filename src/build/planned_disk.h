#pragma once
// A disk that is planned and not yet written: metadata in memory, contents where they come from.

#include <array>
#include <bitset>
#include <deque>
#include <map>
#include <memory>

#include "build/scratch.h"
#include "build/tree.h"
#include "qcow/disk.h"

namespace qcow {

/// First, one thread writes metadata and places contents. Then `seal` ends that, and any number of threads read. Reads
/// before that see what was written, and not what was placed.
///
/// What is written takes memory in pages of 4 KiB, up to a budget; the rest goes to a temporary file. What was placed
/// is read from its source each time. Everything else reads as zeros.
class PlannedDisk final : public Disk {
public:
    static constexpr std::size_t default_budget = std::size_t{32} << 20;

    explicit PlannedDisk(std::uint64_t size, std::size_t budget = default_budget)
        : size_(size), most_pages_(budget / page_bytes) {}

    /// Places `length` bytes of the content, from `from` on. `at` is a multiple of 512, and so is `length`, unless the
    /// rest of the last sector is to be zeros. Places must not overlap. The content outlives the disk.
    void place(GuestOffset at, std::uint64_t length, const Contents& content, std::uint64_t from);

    void seal();

    [[nodiscard]] std::uint64_t size() const override { return size_; }
    [[nodiscard]] std::uint64_t block_size() const override { return page_bytes; }

protected:
    Result<void> do_read(GuestOffset at, Buffers to) override;
    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override;
    [[nodiscard]] Result<void> verify_writable() const override { return {}; }
    Result<void> do_write(GuestOffset at, ConstBuffers from) override;
    Result<void> do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes) override;
    Result<void> do_discard(GuestOffset at, std::uint64_t length) override;
    Result<void> do_flush() override { return {}; }

private:
    static constexpr std::uint64_t page_bytes = 4096;
    static constexpr std::uint64_t sector = 512;
    static constexpr std::uint64_t page_sectors = page_bytes / sector;

    struct Page {
        std::bitset<page_sectors> written;
        std::unique_ptr<std::array<std::byte, page_bytes>> bytes;  // null: they are in the temporary file
        std::uint64_t in_scratch = 0;                              // where they begin there
    };
    struct Placed {
        std::uint64_t at;
        std::uint64_t length;
        const Contents* content;
        std::uint64_t from;
    };

    Result<void> read_flat(std::uint64_t at, std::span<std::byte> to) const;
    Result<void> read_pages(std::uint64_t at, std::span<std::byte> to) const;
    Result<void> write_page(std::uint64_t number, std::size_t inside, std::span<const std::byte> from);
    [[nodiscard]] std::size_t first_placed_behind(std::uint64_t at) const;

    std::uint64_t size_;
    std::size_t most_pages_;
    std::size_t pages_in_memory_ = 0;
    std::map<std::uint64_t, Page> pages_;  // by number
    std::uint64_t scratch_end_ = 0;
    ScratchFile scratch_;        // pages, in the order in which they were first written
    std::deque<Placed> placed_;  // there may be millions: a vector would copy them as it grows
    bool sealed_ = false;
};

/// A part of a disk, as a disk. Both belong to the caller.
class DiskWindow final : public Disk {
public:
    DiskWindow(Disk& disk, std::uint64_t offset, std::uint64_t size) : disk_(disk), offset_(offset), size_(size) {}

    [[nodiscard]] std::uint64_t size() const override { return size_; }
    [[nodiscard]] std::uint64_t block_size() const override { return disk_.block_size(); }

protected:
    Result<void> do_read(GuestOffset at, Buffers to) override { return disk_.read(at + offset_, to); }
    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        auto extent = TRY(disk_.extent(at + offset_, limit));
        extent.start = at;
        return extent;
    }
    [[nodiscard]] Result<void> verify_writable() const override { return {}; }
    Result<void> do_write(GuestOffset at, ConstBuffers from) override { return disk_.write(at + offset_, from); }
    Result<void> do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes) override {
        return disk_.write_zeroes(at + offset_, length, zeroes);
    }
    Result<void> do_discard(GuestOffset at, std::uint64_t length) override {
        return disk_.discard(at + offset_, length);
    }
    Result<void> do_flush() override { return disk_.flush(); }

private:
    Disk& disk_;
    std::uint64_t offset_;
    std::uint64_t size_;
};

}  // namespace qcow
