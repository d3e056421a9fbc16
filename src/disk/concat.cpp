#include "qcow/concat.h"

#include <algorithm>
#include <iterator>

#include "base/bits.h"
#include "base/buffers.h"
#include "base/within_memory.h"
#include "disk/padded.h"
#include "disk/range.h"
#include "qcow/image.h"

namespace qcow {
namespace {

class ConcatDisk final : public Disk {
public:
    struct Part {
        std::uint64_t start = 0;
        std::uint64_t length = 0;  // of the disk, and of the zeros behind it
        std::shared_ptr<Disk> disk;
    };

    explicit ConcatDisk(std::vector<Part> parts) : parts_(std::move(parts)) {
        for (const auto& part : parts_) block_size_ = std::max(block_size_, part.disk->block_size());
    }

    [[nodiscard]] std::uint64_t size() const override {
        return parts_.empty() ? 0 : parts_.back().start + parts_.back().length;
    }
    [[nodiscard]] std::uint64_t block_size() const override { return block_size_; }

protected:
    Result<void> do_read(GuestOffset at, Buffers to) override {
        if (to.empty()) {
            for (const auto& part : parts_) TRY_VOID(part.disk->read({0}, {}));
        }
        while (!to.empty()) {
            const auto& part = part_at(at);
            const std::uint64_t inside = at.value - part.start;
            const auto piece = to.first(std::min<std::uint64_t>(to.size(), part.length - inside));
            const std::uint64_t stored = part.disk->size() - std::min(inside, part.disk->size());
            const auto data = piece.first(std::min<std::uint64_t>(piece.size(), stored));
            if (!data.empty()) {
                if (auto read = part.disk->read({inside}, data); !read) return failed(std::move(read).error(), part);
            }
            fill_zeros(piece.subspan(data.size()));
            at += piece.size();
            to = to.subspan(piece.size());
        }
        return {};
    }

    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        const auto& part = part_at(at);
        const std::uint64_t inside = at.value - part.start;
        const std::uint64_t stored = part.disk->size();
        Extent extent;
        if (inside < stored) {
            auto found = part.disk->extent({inside}, std::min(limit, stored - inside));
            if (!found) return failed(std::move(found).error(), part);
            extent = *found;
        } else {
            extent.length = std::min(limit, part.length - inside);
        }
        extent.start = at;
        return extent;
    }

private:
    /// What a part says of its own bytes, said of those of the whole.
    static std::unexpected<Error> failed(Error error, const Part& part) {
        error.unreadable.start += part.start;
        return std::unexpected(std::move(error));
    }

    [[nodiscard]] const Part& part_at(GuestOffset at) const {
        return *std::prev(std::ranges::upper_bound(parts_, at.value, {}, &Part::start));
    }

    std::vector<Part> parts_;
    std::uint64_t block_size_ = sector_bytes;
};

Result<std::shared_ptr<Disk>> concatenated(std::vector<std::shared_ptr<Disk>> parts) {
    std::vector<ConcatDisk::Part> placed;
    std::uint64_t end = 0;
    for (auto& disk : parts) {
        const std::uint64_t length = rounded_size(disk->size());
        if (length > bit(63) - end)
            return fail(Errc::limit_exceeded, "several sources", "together they are larger than 2^63 bytes");
        placed.push_back({end, length, std::move(disk)});
        end += length;
    }
    return std::make_shared<ConcatDisk>(std::move(placed));
}

}  // namespace

Result<std::shared_ptr<Disk>> concatenate(std::vector<std::shared_ptr<Disk>> parts) {
    return within_memory([&] { return concatenated(std::move(parts)); });
}

std::shared_ptr<Disk> padded(Disk& disk, std::uint64_t size) {
    std::shared_ptr<Disk> borrowed(std::shared_ptr<void>(), &disk);
    if (size == disk.size()) return borrowed;
    return std::make_shared<ConcatDisk>(std::vector{ConcatDisk::Part{0, size, std::move(borrowed)}});
}

}  // namespace qcow
