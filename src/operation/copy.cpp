#include "qcow/copy.h"

#include <algorithm>

#include "base/bits.h"
#include "base/within_memory.h"
#include "disk/padded.h"
#include "disk/range.h"
#include "operation/copier.h"
#include "qcow/image.h"

namespace qcow {
namespace {

/// A disk that exists already as the target of a copy.
class DiskTarget : public CopyTarget {
public:
    DiskTarget(Disk& disk, const CopyOptions& options) : DiskTarget(disk, options, options.sparse_bytes) {}

    [[nodiscard]] std::uint64_t block_size() const override { return 4 * KiB; }

    [[nodiscard]] bool any_order() const override { return true; }

    /// Cuts the data into what is there already, what is zero, and the rest.
    Result<void> prepare(Piece& piece) const override {
        using Kind = PreparedRun::Kind;
        const std::span<const std::byte> bytes = piece.bytes;
        if (unit_ == 0) {
            piece.runs.push_back({Kind::data, bytes.size(), bytes});
            return {};
        }
        const auto there = options_.skip_equal ? TRY(held_already(piece)) : std::span<const std::byte>();
        const auto kind_at = [&](std::size_t begin) {
            const auto unit = bytes.subspan(begin, std::min<std::size_t>(unit_, bytes.size() - begin));
            if (!there.empty() && std::ranges::equal(unit, there.subspan(begin, unit.size()))) return Kind::nothing;
            return options_.sparse_bytes != 0 && is_zero(unit) ? Kind::zero : Kind::data;
        };
        for (std::size_t begin = 0; begin < bytes.size();) {
            const auto kind = kind_at(begin);
            std::size_t end = begin + unit_;
            while (end < bytes.size() && kind_at(end) == kind) end += unit_;
            end = std::min(end, bytes.size());
            piece.runs.push_back({kind, end - begin, bytes.subspan(begin, end - begin)});
            begin = end;
        }
        return {};
    }

    Result<void> write(Piece& piece) override {
        GuestOffset at = piece.at;
        for (const auto& run : piece.runs) {
            if (run.kind == PreparedRun::Kind::zero) TRY_VOID(write_zeroes(at, run.length));
            if (run.kind == PreparedRun::Kind::data) TRY_VOID(write_data(at, run.bytes));
            at += run.length;
        }
        return {};
    }

    Result<void> write_zeroes(GuestOffset at, std::uint64_t length) override {
        if (options_.target_is_zero) return {};
        if (!options_.skip_equal) return disk_.write_zeroes(at, length);
        auto written = each_extent(disk_, at, length, [&](const Extent& there) {
            return there.kind == Extent::Kind::data ? disk_.write_zeroes(there.start, there.length) : Result<void>();
        });
        return passes_over(written) ? disk_.write_zeroes(at, length) : written;
    }

    Result<std::uint64_t> copy_from(GuestOffset at, const Storage& source, HostOffset from,
                                    std::uint64_t length) override {
        if (options_.skip_equal) return 0;  // the bytes are to be looked at
        return disk_.copy_from(at, source, from, length);
    }

protected:
    DiskTarget(Disk& disk, const CopyOptions& options, std::uint64_t unit)
        : disk_(disk), options_(options), unit_(options.skip_equal ? std::max(unit, disk.block_size()) : unit) {}

    virtual Result<void> write_data(GuestOffset at, std::span<const std::byte> bytes) { return disk_.write(at, bytes); }

private:
    /// Whether this is damage below the target that need not stop a salvage: what cannot be compared is written.
    [[nodiscard]] bool passes_over(const Result<void>& result) const {
        return !result && options_.salvage != nullptr && is_loss(result.error());
    }

    /// What the target has where the piece is to go; nothing where that cannot be read.
    Result<std::span<const std::byte>> held_already(Piece& piece) const {
        if (piece.scratch.size() < piece.bytes.size()) piece.scratch.resize(piece.bytes.size());
        const auto there = std::span(piece.scratch).first(piece.bytes.size());
        auto read = disk_.read(piece.at, there);
        if (passes_over(read)) return std::span<const std::byte>();
        if (!read) return std::unexpected(std::move(read).error());
        return there;
    }

    Disk& disk_;
    const CopyOptions& options_;
    const std::uint64_t unit_;  // of what is told apart; 0: everything is data
};

/// An image that exists already as the target of a copy that compresses. Where in the file a cluster comes to lie does
/// not matter, so whoever has read a piece writes it; the image compresses it on the way.
class CompressingTarget final : public DiskTarget {
public:
    CompressingTarget(Image& image, const CopyOptions& options, std::optional<int> level)
        : DiskTarget(image, options, image.block_size()), image_(image), level_(level) {}

    [[nodiscard]] std::uint64_t block_size() const override { return image_.block_size(); }

    Result<std::uint64_t> copy_from(GuestOffset, const Storage&, HostOffset, std::uint64_t) override {
        return 0;  // the bytes are to be compressed
    }

private:
    Result<void> write_data(GuestOffset at, std::span<const std::byte> bytes) override {
        while (!bytes.empty()) {
            const auto cluster = bytes.first(std::min<std::size_t>(bytes.size(), block_size()));
            const bool whole = cluster.size() == block_size() || at.value + cluster.size() == image_.size();
            TRY_VOID(whole ? image_.write_compressed(at, cluster, level_) : image_.write(at, cluster));
            at += cluster.size();
            bytes = bytes.subspan(cluster.size());
        }
        return {};
    }

    Image& image_;
    std::optional<int> level_;
};

/// Copies what `source` comes to in whole sectors, as far as `target` has room for that.
Result<void> copy_sectors(Disk& source, const Disk& target, CopyTarget& to, const CopyOptions& options) {
    TRY_VOID(verify_range(target, {0}, source.size()));
    const std::uint64_t size = std::min(rounded_size(source.size()), target.size());
    return copy_to(*padded(source, size), to, options);
}

}  // namespace

Result<void> copy_compressed(Disk& source, Image& target, const CopyOptions& options, std::optional<int> level) {
    return within_memory([&] {
        CompressingTarget compressing(target, options, level);
        return copy_sectors(source, target, compressing, options);
    });
}

Result<void> copy_disk(Disk& source, Disk& target, const CopyOptions& options) {
    return within_memory([&] {
        DiskTarget disk_target(target, options);
        return copy_sectors(source, target, disk_target, options);
    });
}

}  // namespace qcow
