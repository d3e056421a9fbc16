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

    Discarded(std::uint64_t begin, std::uint64_t length, std::uint64_t block, std::uint64_t sectors) {
        const auto end = begin + length;
        first = (begin + block - 1) / block * block;
        tail_first = end / block * block;
        count = first < tail_first ? tail_first - first : 0;
        tail_count = end == sectors && end > tail_first && tail_first >= first ? end - tail_first : 0;
    }
};

/// Takes what a disk holds now for what was there before everything else.
inline void adopt(Disk& disk, SectorModel& model) {
    Bytes bytes(disk.size());
    if (!disk.read({0}, bytes)) throw std::runtime_error("the disk cannot be read");
    for (std::uint64_t i = 0; i < bytes.size() / sector_bytes; ++i)
        model.preset(i, value_in(i, std::span(bytes).subspan(i * sector_bytes, sector_bytes)));
}

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

    Result<void> write(std::uint64_t first, std::uint64_t count) {
        const auto value = next_value_++;
        return change(first, count, value, [&] { return image_.write(offset(first), stamped(first, count, value)); });
    }

    Result<void> write_compressed(std::uint64_t first, std::uint64_t count) {
        const auto value = next_value_++;
        return change(first, count, value,
                      [&] { return image_.write_compressed(offset(first), stamped(first, count, value)); });
    }

    Result<void> write_zeroes(std::uint64_t first, std::uint64_t count, Disk::Zeroes zeroes) {
        return change(first, count, 0,
                      [&] { return image_.write_zeroes(offset(first), count * sector_bytes, zeroes); });
    }

    Result<void> discard(std::uint64_t first, std::uint64_t count) {
        const auto block = std::max(image_.block_size() / sector_bytes, std::uint64_t{1});
        const Discarded range(first, count, block, sectors());
        const auto begun = clock_();
        const auto changed = model_.begin(range.first, range.count, 0, begun, !discards_read_as_zeros_);
        const auto changed_tail = model_.begin(range.tail_first, range.tail_count, 0, begun, true);
        auto result = image_.discard(offset(first), count * sector_bytes);
        settle(result, changed);
        settle(result, changed_tail);
        return result;
    }

    /// All of the disk, by something else than a request: then each sector holds what `values` says.
    template <class Verb>
    Result<void> change_all(const std::vector<Value>& values, const Verb& verb) {
        const auto begun = clock_();
        for (std::uint64_t i = 0; i < values.size(); ++i) model_.begin(i, 1, values[i], begun);
        auto result = verb();
        settle(result, {0, values.size(), begun});
        return result;
    }

    Result<void> flush() {
        const auto begun = clock_();
        auto result = image_.flush();
        if (!result) ++failed_flushes_;
        if (result) model_.flushed(begun, clock_());
        return result;
    }

    [[nodiscard]] std::uint64_t failed_flushes() const { return failed_flushes_; }

    /// Flushes, too.
    Result<void> close() {
        const auto begun = clock_();
        auto result = image_.close();
        if (result) model_.flushed(begun, clock_());
        return result;
    }

    Result<void> resize(std::uint64_t count, Image::Shrink shrink = Image::Shrink::refuse) {
        const auto before = sectors();
        const auto begun = clock_();
        const auto lost =
            count < before ? model_.begin(count, before - count, 0, begun) : SectorModel::Change{0, 0, begun};
        model_.begin_resize(count, begun);
        auto result = image_.resize(count * sector_bytes, shrink);
        if (!result) return result;
        const auto ended = clock_();
        model_.end(lost, ended);
        model_.end_resize(begun, ended);
        return result;
    }

    /// Reads, and tells what is wrong with that.
    Result<std::optional<std::string>> inspect(std::uint64_t first, std::uint64_t count) {
        Bytes bytes(count * sector_bytes);
        const auto begun = clock_();
        if (const auto read = image_.read(offset(first), bytes); !read) return std::unexpected(read.error());
        const auto ended = clock_();
        for (std::uint64_t i = 0; i < count; ++i) {
            const auto value = value_in(first + i, std::span(bytes).subspan(i * sector_bytes, sector_bytes));
            if (!model_.allows(first + i, value, begun, ended)) return model_.complaint(first + i, value, begun, ended);
        }
        return std::nullopt;
    }

    /// The same, where being unable to read is wrong, too.
    std::optional<std::string> verify(std::uint64_t first, std::uint64_t count) {
        auto wrong = inspect(first, count);
        return wrong ? *std::move(wrong) : wrong.error().message();
    }

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

    void settle(const Result<void>& result, const SectorModel::Change& change) {
        if (result) {
            model_.end(change, clock_());
            const auto now = clock_();
            if (writethrough_) model_.flushed(now, now);
        } else {
            model_.fail(change, clock_());
        }
    }

    Image& image_;
    SectorModel& model_;
    std::function<Tick()> clock_;
    bool discards_read_as_zeros_;
    bool writethrough_ = false;
    std::atomic<Value> next_value_;
    std::atomic<std::uint64_t> failed_flushes_ = 0;
};

}  // namespace qcow::test
