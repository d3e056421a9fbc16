#include "qcow/copy.h"

#include <algorithm>

#include "base/bits.h"
#include "base/try.h"
#include "disk/range.h"
#include "operation/copier.h"
#include "qcow/image.h"

namespace qcow {
namespace {

/// A disk that exists already as the target of a copy.
class DiskTarget final : public CopyTarget {
public:
    DiskTarget(Disk& disk, const CopyOptions& options) : disk_(disk), options_(options) {}

    [[nodiscard]] std::uint64_t block_size() const override { return 4 * KiB; }

    [[nodiscard]] bool any_order() const override { return true; }

    /// Cuts the data into what is zero and what is not.
    Result<void> prepare(Piece& piece) const override {
        const std::span<const std::byte> bytes = piece.bytes;
        const auto block = static_cast<std::size_t>(options_.sparse_bytes);
        if (block == 0) {
            piece.runs.push_back({PreparedRun::Kind::data, bytes.size(), bytes});
            return {};
        }
        const auto block_is_zero = [&](std::size_t begin) {
            return is_zero(bytes.subspan(begin, std::min(block, bytes.size() - begin)));
        };
        for (std::size_t begin = 0; begin < bytes.size();) {
            const bool zero = block_is_zero(begin);
            std::size_t end = begin + block;
            while (end < bytes.size() && block_is_zero(end) == zero) end += block;
            end = std::min(end, bytes.size());
            const auto kind = zero ? PreparedRun::Kind::zero : PreparedRun::Kind::data;
            piece.runs.push_back({kind, end - begin, bytes.subspan(begin, end - begin)});
            begin = end;
        }
        return {};
    }

    Result<void> write(const Piece& piece) override {
        GuestOffset at = piece.at;
        for (const auto& run : piece.runs) {
            if (run.kind == PreparedRun::Kind::zero) {
                TRY_VOID(write_zeroes(at, run.length));
            } else {
                TRY_VOID(disk_.write(at, run.bytes));
            }
            at += run.length;
        }
        return {};
    }

    Result<void> write_zeroes(GuestOffset at, std::uint64_t length) override {
        return options_.target_is_zero ? Result<void>() : disk_.write_zeroes(at, length);
    }

    Result<std::uint64_t> copy_from(GuestOffset at, const Storage& source, HostOffset from,
                                    std::uint64_t length) override {
        return disk_.copy_from(at, source, from, length);
    }

private:
    Disk& disk_;
    const CopyOptions& options_;
};

/// An image that exists already as the target of a copy that compresses. Where in the file a cluster comes to lie does
/// not matter, so whoever has read a piece writes it; the image compresses it on the way.
class CompressingTarget final : public CopyTarget {
public:
    CompressingTarget(Image& image, const CopyOptions& options, std::optional<int> level)
        : image_(image), options_(options), level_(level) {}

    [[nodiscard]] std::uint64_t block_size() const override { return image_.block_size(); }
    [[nodiscard]] bool any_order() const override { return true; }

    Result<void> prepare(Piece& piece) const override {
        piece.runs.push_back({PreparedRun::Kind::data, piece.bytes.size(), piece.bytes});
        return {};
    }

    Result<void> write(const Piece& piece) override {
        GuestOffset at = piece.at;
        for (std::span<const std::byte> rest = piece.bytes; !rest.empty();) {
            const auto cluster = rest.first(std::min<std::size_t>(rest.size(), block_size()));
            TRY_VOID(write_cluster(at, cluster));
            at += cluster.size();
            rest = rest.subspan(cluster.size());
        }
        return {};
    }

    Result<void> write_zeroes(GuestOffset at, std::uint64_t length) override {
        return options_.target_is_zero ? Result<void>() : image_.write_zeroes(at, length);
    }

    Result<std::uint64_t> copy_from(GuestOffset, const Storage&, HostOffset, std::uint64_t) override {
        return 0;  // the bytes are to be compressed
    }

private:
    Result<void> write_cluster(GuestOffset at, std::span<const std::byte> bytes) {
        if (is_zero(bytes)) return options_.target_is_zero ? Result<void>() : image_.write_zeroes(at, bytes.size());
        const bool whole = bytes.size() == block_size() || at.value + bytes.size() == image_.size();
        return whole ? image_.write_compressed(at, bytes, level_) : image_.write(at, bytes);
    }

    Image& image_;
    const CopyOptions& options_;
    std::optional<int> level_;
};

}  // namespace

Result<void> copy_compressed(Disk& source, Image& target, const CopyOptions& options, std::optional<int> level) {
    TRY_VOID(verify_range(target, {0}, source.size()));
    CompressingTarget compressing(target, options, level);
    return copy_to(source, compressing, options.workers, options.progress);
}

Result<void> copy_disk(Disk& source, Disk& target, const CopyOptions& options) {
    TRY_VOID(verify_range(target, {0}, source.size()));
    DiskTarget disk_target(target, options);
    return copy_to(source, disk_target, options.workers, options.progress);
}

}  // namespace qcow
