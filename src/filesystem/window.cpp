#include <fmt/ranges.h>

#include <bit>

#include "base/within_memory.h"
#include "disk/range.h"
#include "qcow/filesystem.h"
#include "qcow/text.h"

namespace qcow {
namespace {

class Window final : public Disk {
public:
    Window(std::shared_ptr<Disk> disk, GuestRange range)
        : disk_(std::move(disk)), start_(range.start), size_(range.length) {
        // A block of the window is one of the disk only where the window begins with one.
        block_size_ = disk_->block_size();
        if (start_.value != 0) block_size_ = std::min(block_size_, std::uint64_t{1} << std::countr_zero(start_.value));
    }

    [[nodiscard]] std::uint64_t size() const override { return size_; }
    [[nodiscard]] std::uint64_t block_size() const override { return block_size_; }

protected:
    Result<void> do_read(GuestOffset at, Buffers to) override { return own(disk_->read(shifted(at), to)); }

    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        auto found = disk_->extent(shifted(at), limit);
        if (!found) return own(std::move(found));
        found->start = at;
        return found;
    }

    /// A write of no bytes tells whether the disk can be written.
    [[nodiscard]] Result<void> verify_writable() const override { return disk_->write({0}, {}); }
    Result<void> do_write(GuestOffset at, ConstBuffers from) override { return disk_->write(shifted(at), from); }
    Result<void> do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes) override {
        return disk_->write_zeroes(shifted(at), length, zeroes);
    }
    Result<void> do_discard(GuestOffset at, std::uint64_t length) override {
        return disk_->discard(shifted(at), length);
    }
    Result<std::uint64_t> do_copy_from(GuestOffset at, const Storage& source, HostOffset from,
                                       std::uint64_t length) override {
        return disk_->copy_from(shifted(at), source, from, length);
    }
    Result<void> do_flush() override { return disk_->flush(); }
    Result<void> do_survive_in(SurvivingMemory memory) override { return disk_->survive_in(std::move(memory)); }

private:
    [[nodiscard]] GuestOffset shifted(GuestOffset at) const { return start_ + at.value; }

    /// What the disk says of its bytes, said of those of the window.
    template <class T>
    Result<T> own(Result<T> result) const {
        if (!result && result.error().unreadable.length != 0 && result.error().unreadable.start >= start_)
            result.error().unreadable.start = {result.error().unreadable.start - start_};
        return result;
    }

    std::shared_ptr<Disk> disk_;
    GuestOffset start_;
    std::uint64_t size_;
    std::uint64_t block_size_;
};

}  // namespace

Result<std::shared_ptr<Disk>> window(std::shared_ptr<Disk> disk, GuestRange range) {
    return within_memory([&]() -> Result<std::shared_ptr<Disk>> {
        TRY_VOID(verify_range(*disk, range.start, range.length));
        return std::make_shared<Window>(std::move(disk), range);
    });
}

Result<std::shared_ptr<Disk>> file_system_disk(std::shared_ptr<Disk> disk, std::optional<unsigned> number) {
    return within_memory([&]() -> Result<std::shared_ptr<Disk>> {
        if (number) return partition_disk(disk, *number);
        const auto table = TRY(list_partitions(*disk));
        if (table.kind == PartitionTable::Kind::none || !table.content.type.empty()) return disk;
        std::vector<unsigned> known;
        std::vector<std::string> names;
        for (const auto& partition : table.partitions) {
            if (partition.content.type.empty()) continue;
            known.push_back(partition.number);
            names.push_back(
                printable(fmt::format("{} ({}{}{})", partition.number, partition.content.type,
                                      partition.content.label.empty() ? "" : " ", partition.content.label)));
        }
        if (known.size() == 1) return partition_disk(disk, known.front());
        if (known.empty()) return fail(Errc::not_found, "", "no partition of the disk has contents that are known");
        return fail(Errc::invalid_argument, "",
                    fmt::format("the disk has several partitions: name one, as DISK:{}; they are {}", known.front(),
                                fmt::join(names, ", ")));
    });
}

Result<std::shared_ptr<Disk>> partition_disk(std::shared_ptr<Disk> disk, unsigned number) {
    return within_memory([&]() -> Result<std::shared_ptr<Disk>> {
        const auto table = TRY(list_partitions(*disk));
        for (const auto& partition : table.partitions) {
            if (partition.number != number) continue;
            if (partition.start.value >= disk->size())
                return fail(Errc::corrupt, fmt::format("partition {}", number), "it begins past the end of the disk");
            return window(disk, {partition.start, std::min(partition.bytes, disk->size() - partition.start.value)});
        }
        return fail(Errc::not_found, fmt::format("partition {}", number),
                    table.partitions.empty()
                        ? "the disk has no partitions"
                        : "the disk has no partition with this number; qcow partitions lists them");
    });
}

}  // namespace qcow
