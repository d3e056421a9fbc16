#include "qcow/concat.h"

#include <algorithm>
#include <iterator>

#include "base/bits.h"
#include "base/try.h"
#include "disk/range.h"

namespace qcow {
namespace {

constexpr std::uint64_t sector = 512;

class ConcatDisk final : public Disk {
public:
    struct Part {
        std::uint64_t start = 0;
        std::uint64_t length = 0;  // of the disk, and of the zeros up to the next sector
        std::shared_ptr<Disk> disk;
    };

    explicit ConcatDisk(std::vector<Part> parts) : parts_(std::move(parts)) {
        for (const auto& part : parts_) block_size_ = std::max(block_size_, part.disk->block_size());
    }

    [[nodiscard]] std::uint64_t size() const override {
        return parts_.empty() ? 0 : parts_.back().start + parts_.back().length;
    }
    [[nodiscard]] std::uint64_t block_size() const override { return block_size_; }

    Result<void> read(GuestOffset at, std::span<std::byte> to) override {
        TRY_VOID(verify_range(*this, at, to.size()));
        while (!to.empty()) {
            const auto& part = part_at(at);
            const std::uint64_t inside = at.value - part.start;
            const auto piece = to.first(std::min<std::uint64_t>(to.size(), part.length - inside));
            const std::uint64_t stored = part.disk->size() - std::min(inside, part.disk->size());
            const auto data = piece.first(std::min<std::uint64_t>(piece.size(), stored));
            if (!data.empty()) TRY_VOID(part.disk->read({inside}, data));
            std::ranges::fill(piece.subspan(data.size()), std::byte{0});
            at += piece.size();
            to = to.subspan(piece.size());
        }
        return {};
    }

    Result<Extent> extent(GuestOffset at, std::uint64_t limit) override {
        TRY_VOID(verify_range(*this, at, 1));
        const auto& part = part_at(at);
        const std::uint64_t inside = at.value - part.start;
        const std::uint64_t stored = part.disk->size();
        Extent extent;
        if (inside < stored) {
            extent = TRY(part.disk->extent({inside}, std::min(limit, stored - inside)));
        } else {
            extent.length = std::min(limit, part.length - inside);
        }
        extent.start = at;
        return extent;
    }

private:
    [[nodiscard]] const Part& part_at(GuestOffset at) const {
        return *std::prev(std::ranges::upper_bound(parts_, at.value, {}, &Part::start));
    }

    std::vector<Part> parts_;
    std::uint64_t block_size_ = sector;
};

}  // namespace

Result<std::shared_ptr<Disk>> concatenate(std::vector<std::shared_ptr<Disk>> parts) {
    std::vector<ConcatDisk::Part> placed;
    std::uint64_t end = 0;
    for (auto& disk : parts) {
        const std::uint64_t sectors = divide_up(disk->size(), sector);
        if (sectors > (bit(63) - end) / sector) {
            return fail(Errc::limit_exceeded, "several sources", "together they are larger than 2^63 bytes");
        }
        placed.push_back({end, sectors * sector, std::move(disk)});
        end += sectors * sector;
    }
    return std::make_shared<ConcatDisk>(std::move(placed));
}

}  // namespace qcow
