#pragma once
// A guest that keeps account of what its disk may hold.

#include <atomic>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>

#include "qcow/image.h"
#include "support/model.h"

namespace qcow::test {

/// The sectors that a discard changes: those of whole blocks. The last block of the disk, where it is a shorter one,
/// counts as whole or not.
struct Discarded {
    std::uint64_t first = 0;
    std::uint64_t count = 0;
    std::uint64_t tail_first = 0;
    std::uint64_t tail_count = 0;

    Discarded(std::uint64_t begin, std::uint64_t length, std::uint64_t block, std::uint64_t sectors);
};

/// Takes what a disk holds now for what was there before everything else.
void adopt(Disk& disk, SectorModel& model);

/// Whole sectors only. May be used by several threads at once, but for resize. What fails may have been done or not.
class Guest {
public:
    /// `discards_read_as_zeros`: whether the format lets whole blocks become zeros, whatever lies below them.
    Guest(Image& image, SectorModel& model, std::function<Tick()> clock, bool discards_read_as_zeros,
          Value first_number = 1)
        : image_(image),
          model_(model),
          clock_(std::move(clock)),
          discards_read_as_zeros_(discards_read_as_zeros),
          next_value_(first_number) {}

    /// From now on what returns is durable without a flush.
    void expect_writethrough() { writethrough_ = true; }

    Result<void> write(std::uint64_t first, std::uint64_t count);

    Result<void> write_compressed(std::uint64_t first, std::uint64_t count);

    Result<void> write_zeroes(std::uint64_t first, std::uint64_t count, Disk::Zeroes zeroes);

    Result<void> discard(std::uint64_t first, std::uint64_t count);

    /// All of the disk, by something else than a request: then each sector holds what `values` says.
    template <class Verb>
    Result<void> change_all(const std::vector<Value>& values, const Verb& verb) {
        const auto begun = clock_();
        for (std::uint64_t i = 0; i < values.size(); ++i) model_.begin(i, 1, values[i], begun);
        auto result = verb();
        settle(result, {0, values.size(), begun});
        return result;
    }

    /// Afterwards the disk holds what the layer below does. One thread.
    Result<void> make_empty();

    Result<void> flush();

    [[nodiscard]] std::uint64_t failed_flushes() const { return failed_flushes_; }

    /// Flushes, too.
    Result<void> close();

    Result<void> resize(std::uint64_t count, Image::Shrink shrink = Image::Shrink::refuse);

    /// A snapshot that was made: what it holds, from when until when it must be there, and when it must be gone.
    struct Snapshot {
        std::string name;
        std::string other_name;  ///< that it had before, or will have
        Bytes contents;
        Tick made = 0;
        Tick removing = never;
        Tick gone = never;
        static constexpr Tick never = ~Tick{0};
    };

    /// Makes a snapshot, if none of those that were made is left; else renames it, removes it, or applies it, by
    /// `dice`. One thread.
    Result<void> change_snapshots(std::uint64_t dice);
    [[nodiscard]] const std::vector<Snapshot>& snapshots() const { return snapshots_; }

    /// Reads, and tells what is wrong with that.
    Result<std::optional<std::string>> inspect(std::uint64_t first, std::uint64_t count);

    /// The same, where being unable to read is wrong, too.
    std::optional<std::string> verify(std::uint64_t first, std::uint64_t count);

    void adopt() { test::adopt(image_, model_); }

    [[nodiscard]] std::uint64_t sectors() const { return image_.size() / sector_bytes; }
    [[nodiscard]] Image& image() { return image_; }

private:
    static GuestOffset offset(std::uint64_t sector) { return {sector * sector_bytes}; }

    template <class Verb>
    Result<void> change(std::uint64_t first, std::uint64_t count, Value value, const Verb& verb) {
        const auto change = model_.begin(first, count, value, clock_());
        auto result = verb();
        settle(result, change);
        return result;
    }

    void settle(const Result<void>& result, const SectorModel::Change& change);

    Image& image_;
    SectorModel& model_;
    std::function<Tick()> clock_;
    bool discards_read_as_zeros_;
    bool writethrough_ = false;
    std::atomic<Value> next_value_;
    std::atomic<std::uint64_t> failed_flushes_ = 0;
    std::vector<Snapshot> snapshots_;
};

}  // namespace qcow::test
