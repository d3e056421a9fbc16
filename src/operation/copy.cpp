#include "qcow/copy.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/bits.h"
#include "base/try.h"
#include "base/workers.h"
#include "disk/range.h"

namespace qcow {
namespace {

/// Small enough that what was read is still in the processor's cache when it is written.
constexpr std::uint64_t min_piece_bytes = 256 * KiB;
constexpr unsigned buffers_per_worker = 3;

/// A stretch of the source's data, in memory.
struct Filled {
    GuestOffset at;
    std::size_t length = 0;
    std::unique_ptr<std::byte[]> memory;
};

/// Kernels let one thread at a time write to a file, and have the others spin meanwhile. So workers queue what they
/// have read; whoever finds nobody writing writes all that is queued, and the others go on reading.
class Copier {
public:
    Copier(Disk& source, Disk& target, const CopyOptions& options)
        : source_(source),
          target_(target),
          options_(options),
          workers_(options.workers == 0 ? default_workers() : options.workers),
          piece_bytes_(std::max(min_piece_bytes, source.block_size())),
          spare_buffers_(std::size_t{workers_} * buffers_per_worker) {}

    Result<void> run() {
        return run_workers(workers_, [this](unsigned) {
            auto result = work();
            if (!result) {
                const std::lock_guard lock(mutex_);
                failed_ = true;
                buffer_returned_.notify_all();
            }
            return result;
        });
    }

private:
    using Lock = std::unique_lock<std::mutex>;

    Result<void> work() {
        Lock lock(mutex_);
        while (!failed_) {
            auto piece = TRY(next(lock));
            if (!piece) break;
            if (piece->kind != Extent::Kind::data) {
                lock.unlock();
                if (!options_.target_is_zero) TRY_VOID(target_.write_zeroes(piece->start, piece->length));
                lock.lock();
                report(piece->length);
                continue;
            }
            if (can_be_copied_by_kernel(*piece)) TRY_VOID(copy_by_kernel(lock, *piece));
            while (piece->length > 0) TRY_VOID(read_and_queue(lock, *piece));
            TRY_VOID(write_queued(lock));
        }
        return {};
    }

    /// The next stretch of the source that one worker is to take.
    Result<std::optional<Extent>> next(const Lock&) {
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
        skip(rest_, piece.length);
        return piece;
    }

    static void skip(Extent& extent, std::uint64_t bytes) {
        extent.start += bytes;
        extent.length -= bytes;
        if (extent.host) *extent.host += bytes;
    }

    [[nodiscard]] bool can_be_copied_by_kernel(const Extent& extent) const {
        return kernel_copies_ && extent.host.has_value();
    }

    Result<void> copy_by_kernel(Lock& lock, Extent& piece) {
        lock.unlock();
        const auto done = TRY(target_.copy_from(piece.start, *piece.storage, *piece.host, piece.length));
        lock.lock();
        if (done == 0) kernel_copies_ = false;
        skip(piece, done);
        report(done);
        return {};
    }

    /// Reads the front of `piece` into a buffer, waiting for one if need be.
    Result<void> read_and_queue(Lock& lock, Extent& piece) {
        while (spare_buffers_ == 0 && !failed_) {
            // All are queued: write them, or wait for the one who does.
            if (writing_) {
                buffer_returned_.wait(lock);
            } else {
                TRY_VOID(write_queued(lock));
            }
        }
        if (failed_) {
            piece.length = 0;  // the error is another worker's, and is reported by it
            return {};
        }
        --spare_buffers_;
        Filled filled{piece.start, std::min<std::uint64_t>(piece.length, piece_bytes_), take_memory()};
        lock.unlock();
        if (!filled.memory) filled.memory = std::make_unique_for_overwrite<std::byte[]>(piece_bytes_);
        TRY_VOID(source_.read(filled.at, {filled.memory.get(), filled.length}));
        lock.lock();
        skip(piece, filled.length);
        queue_.push_back(std::move(filled));
        return {};
    }

    std::unique_ptr<std::byte[]> take_memory() {
        if (memory_.empty()) return nullptr;
        auto memory = std::move(memory_.back());
        memory_.pop_back();
        return memory;
    }

    Result<void> write_queued(Lock& lock) {
        if (writing_) return {};
        writing_ = true;
        while (!queue_.empty()) {
            auto filled = std::move(queue_.front());
            queue_.pop_front();
            lock.unlock();
            TRY_VOID(write_sparse(filled.at, {filled.memory.get(), filled.length}));
            lock.lock();
            memory_.push_back(std::move(filled.memory));
            ++spare_buffers_;
            buffer_returned_.notify_one();
            report(filled.length);
        }
        writing_ = false;
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
        done_ += bytes;
        if (options_.progress) options_.progress(done_, source_.size());
    }

    Disk& source_;
    Disk& target_;
    const CopyOptions& options_;
    const unsigned workers_;
    const std::uint64_t piece_bytes_;

    std::mutex mutex_;  // guards all that follows; not held while anything is read or written
    std::condition_variable buffer_returned_;
    bool failed_ = false;
    bool kernel_copies_ = true;
    bool writing_ = false;
    std::size_t spare_buffers_;
    std::vector<std::unique_ptr<std::byte[]>> memory_;  // of spare buffers that have been used before
    std::deque<Filled> queue_;
    Extent rest_;  // of the extent that is being handed out, and where the next one begins
    std::uint64_t done_ = 0;
};

}  // namespace

Result<void> copy_disk(Disk& source, Disk& target, const CopyOptions& options) {
    TRY_VOID(verify_range(target, {0}, source.size()));
    return Copier(source, target, options).run();
}

}  // namespace qcow
