#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>

#include "base/bits.h"
#include "base/try.h"
#include "base/workers.h"
#include "disk/range.h"
#include "qcow/copy.h"

namespace qcow {
namespace {

/// Small enough that what was read is still in the processor's cache when it is written.
constexpr std::uint64_t min_piece_bytes = 256 * KiB;

class Copier {
public:
    Copier(Disk& source, Disk& target, const CopyOptions& options)
        : source_(source),
          target_(target),
          options_(options),
          piece_bytes_(std::max(min_piece_bytes, source.block_size())) {}

    Result<void> run() {
        return run_workers(options_.workers == 0 ? default_workers() : options_.workers, [this](unsigned) {
            auto result = work();
            if (!result) failed_ = true;
            return result;
        });
    }

private:
    Result<void> work() {
        const auto buffer = std::make_unique_for_overwrite<std::byte[]>(piece_bytes_);
        while (!failed_) {
            const auto piece = TRY(next());
            if (!piece) break;
            TRY_VOID(copy(*piece, {buffer.get(), piece_bytes_}));
            report(piece->length);
        }
        return {};
    }

    /// The next stretch of the source that one worker is to take. All that happens one thread at a time is this.
    Result<std::optional<Extent>> next() {
        const std::lock_guard lock(mutex_);
        if (rest_.length == 0) {
            const GuestOffset at = rest_.start;
            if (at.value >= source_.size()) return std::nullopt;
            rest_ = TRY(source_.extent(at, source_.size() - at.value));
        }
        Extent piece = rest_;
        if (rest_.kind == Extent::Kind::data && !can_be_copied_by_kernel(rest_)) {
            // To the next multiple of the piece's size, so that clusters are not cut in two.
            piece.length = std::min(piece.length, piece_bytes_ - (piece.start.value & (piece_bytes_ - 1)));
        }
        rest_.start += piece.length;
        rest_.length -= piece.length;
        if (rest_.host) *rest_.host += piece.length;
        return piece;
    }

    [[nodiscard]] bool can_be_copied_by_kernel(const Extent& extent) const {
        return kernel_copies_ && extent.host.has_value();
    }

    Result<void> copy(Extent extent, std::span<std::byte> buffer) {
        if (extent.kind != Extent::Kind::data) {
            return options_.target_is_zero ? Result<void>() : target_.write_zeroes(extent.start, extent.length);
        }
        if (can_be_copied_by_kernel(extent)) {
            const auto done = TRY(target_.copy_from(extent.start, *extent.storage, *extent.host, extent.length));
            if (done == 0) kernel_copies_ = false;
            extent.start += done;
            extent.length -= done;
        }
        while (extent.length > 0) {
            const auto part = buffer.first(std::min<std::uint64_t>(extent.length, buffer.size()));
            TRY_VOID(source_.read(extent.start, part));
            TRY_VOID(write_sparse(extent.start, part));
            extent.start += part.size();
            extent.length -= part.size();
        }
        return {};
    }

    /// Writes what is not zero, in runs of blocks of `sparse_bytes`.
    Result<void> write_sparse(GuestOffset at, std::span<const std::byte> bytes) {
        if (options_.sparse_bytes == 0) return target_.write(at, bytes);
        const auto block = static_cast<std::size_t>(options_.sparse_bytes);
        const auto block_is_zero = [&](std::size_t begin) {
            return is_zero(bytes.subspan(begin, std::min(block, bytes.size() - begin)));
        };
        for (std::size_t begin = 0; begin < bytes.size();) {
            const bool zero = block_is_zero(begin);
            std::size_t end = begin + block;
            while (end < bytes.size() && block_is_zero(end) == zero) end += block;
            end = std::min(end, bytes.size());
            if (!zero) {
                TRY_VOID(target_.write(at + begin, bytes.subspan(begin, end - begin)));
            } else if (!options_.target_is_zero) {
                TRY_VOID(target_.write_zeroes(at + begin, end - begin));
            }
            begin = end;
        }
        return {};
    }

    void report(std::uint64_t bytes) {
        if (!options_.progress) return;
        const std::lock_guard lock(mutex_);
        done_ += bytes;
        options_.progress(done_, source_.size());
    }

    Disk& source_;
    Disk& target_;
    const CopyOptions& options_;
    const std::uint64_t piece_bytes_;

    std::atomic<bool> failed_ = false;
    std::atomic<bool> kernel_copies_ = true;
    std::mutex mutex_;
    Extent rest_;  // of the extent that is being handed out, and where the next one begins
    std::uint64_t done_ = 0;
};

}  // namespace

Result<void> copy_disk(Disk& source, Disk& target, const CopyOptions& options) {
    TRY_VOID(verify_range(target, {0}, source.size()));
    return Copier(source, target, options).run();
}

}  // namespace qcow
