#include "operation/copier.h"

#include <algorithm>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/bits.h"
#include "base/within_memory.h"
#include "base/workers.h"

namespace qcow {
namespace {

/// Small enough that what was read is still in the processor's cache when it is written.
constexpr std::uint64_t min_piece_bytes = 256 * KiB;
constexpr std::size_t buffers_per_worker = 4;

/// A piece with the memory that it lives in, used again and again.
struct Buffer {
    std::unique_ptr<std::byte[]> memory;
    Piece piece;
};

/// A stretch of the source, numbered in guest order. Data that were read are in `buffer`; without one, `extent` is
/// zeros, or data for the kernel to copy.
struct Stretch {
    std::uint64_t number = 0;
    Extent extent;
    std::unique_ptr<Buffer> buffer;
};

/// Workers take stretches in guest order, read and prepare them at the same time, and put them back into order for a
/// target that needs it: whoever finds nobody writing writes all that is next, and the others go on reading. Otherwise
/// each writes what it has read while that is still in its processor's cache.
class Copier {
public:
    Copier(Disk& source, CopyTarget& target, unsigned workers,
           const std::function<void(std::uint64_t, std::uint64_t)>& progress)
        : source_(source),
          target_(target),
          progress_(progress),
          workers_(workers == 0 ? default_workers() : workers),
          any_order_(target.any_order()),
          block_size_(target.block_size()),
          piece_bytes_(std::max({min_piece_bytes, source.block_size(), block_size_})) {
        for (std::size_t i = 0; i < workers_ * buffers_per_worker; ++i) spare_.push_back(std::make_unique<Buffer>());
    }

    Result<void> run() {
        return run_workers(workers_, [this](unsigned) {
            auto result = within_memory([&] { return work(); });
            if (!result) {
                const std::lock_guard lock(mutex_);
                failed_ = true;
                changed_.notify_all();
            }
            return result;
        });
    }

private:
    using Lock = std::unique_lock<std::mutex>;

    Result<void> work() {
        Lock lock(mutex_);
        while (!failed_) {
            if (spare_.empty() && !can_write()) {
                changed_.wait(lock);
                continue;
            }
            if (!spare_.empty()) {
                auto stretch = TRY(next());
                if (!stretch) break;
                TRY_VOID(fill(lock, *stretch));
                const auto number = stretch->number;
                ready_.emplace(number, *std::move(stretch));
            }
            TRY_VOID(write_ready(lock));
        }
        return {};
    }

    /// The next stretch of the source, with a buffer if it is to be read.
    Result<std::optional<Stretch>> next() {
        if (cursor_.value >= source_.size()) return std::nullopt;
        if (rest_.start != cursor_ || rest_.length == 0) {
            rest_ = TRY(source_.extent(cursor_, source_.size() - cursor_.value));
        }
        Extent extent = rest_;
        const std::uint64_t end = extent.start.value + extent.length;
        const std::uint64_t aligned_end = end == source_.size() ? end : align_down(end, block_size_);
        const std::uint64_t whole_blocks = aligned_end > extent.start.value ? aligned_end - extent.start.value : 0;
        bool read = false;
        if (whole_blocks == 0) {
            // A block of which this extent is only a part.
            extent.length = std::min(block_size_, source_.size() - cursor_.value);
            read = true;
        } else {
            extent.length = whole_blocks;
            read = extent.kind == Extent::Kind::data && !(kernel_copies_ && extent.host);
            // To the next multiple of the piece's size, so that the source's clusters are not cut in two.
            if (read) extent.length = std::min(whole_blocks, piece_bytes_ - (cursor_.value & (piece_bytes_ - 1)));
        }
        cursor_ += extent.length;
        skip(rest_, std::min(extent.length, rest_.length));
        Stretch stretch{next_number_++, extent, nullptr};
        if (read) {
            stretch.buffer = std::move(spare_.back());
            spare_.pop_back();
        }
        return stretch;
    }

    static void skip(Extent& extent, std::uint64_t bytes) {
        extent.start += bytes;
        extent.length -= bytes;
        if (extent.host) *extent.host += bytes;
    }

    Result<void> fill(Lock& lock, Stretch& stretch) {
        if (!stretch.buffer) return {};
        lock.unlock();
        TRY_VOID(read(*stretch.buffer, stretch.extent.start, stretch.extent.length));
        lock.lock();
        return {};
    }

    Result<void> read(Buffer& buffer, GuestOffset at, std::uint64_t length) {
        if (!buffer.memory) buffer.memory = std::make_unique_for_overwrite<std::byte[]>(piece_bytes_);
        auto& piece = buffer.piece;
        piece.at = at;
        piece.bytes = {buffer.memory.get(), length};
        piece.runs.clear();
        TRY_VOID(source_.read(at, piece.bytes));
        return target_.prepare(piece);
    }

    [[nodiscard]] bool can_write() const {
        if (ready_.empty()) return false;
        return any_order_ || (!writing_ && ready_.begin()->first == next_to_write_);
    }

    Result<void> write_ready(Lock& lock) {
        while (can_write()) {
            writing_ = true;  // and stays so after an error: nobody goes on then
            auto stretch = std::move(ready_.extract(ready_.begin()).mapped());
            lock.unlock();
            TRY_VOID(write(stretch));
            lock.lock();
            writing_ = false;
            ++next_to_write_;
            if (stretch.buffer) spare_.push_back(std::move(stretch.buffer));
            done_ += stretch.extent.length;
            if (progress_) progress_(done_, source_.size());
            changed_.notify_all();
        }
        return {};
    }

    Result<void> write(const Stretch& stretch) {
        const auto& extent = stretch.extent;
        if (stretch.buffer) return target_.write(stretch.buffer->piece);
        if (extent.kind != Extent::Kind::data) return target_.write_zeroes(extent.start, extent.length);
        const auto done = TRY(target_.copy_from(extent.start, *extent.storage, *extent.host, extent.length));
        return done == extent.length ? Result<void>() : copy_rest(extent, done);
    }

    /// What the kernel did not copy. It will not be asked again.
    Result<void> copy_rest(const Extent& extent, std::uint64_t done) {
        {
            const std::lock_guard lock(mutex_);
            kernel_copies_ = false;
        }
        Buffer buffer;
        while (done < extent.length) {
            const std::uint64_t length = std::min(extent.length - done, piece_bytes_);
            TRY_VOID(read(buffer, extent.start + done, length));
            TRY_VOID(target_.write(buffer.piece));
            done += length;
        }
        return {};
    }

    Disk& source_;
    CopyTarget& target_;
    const std::function<void(std::uint64_t, std::uint64_t)>& progress_;
    const unsigned workers_;
    const bool any_order_;
    const std::uint64_t block_size_;
    const std::uint64_t piece_bytes_;

    std::mutex mutex_;  // guards all that follows; not held while data are read, prepared or written
    std::condition_variable changed_;
    bool failed_ = false;
    bool kernel_copies_ = true;
    GuestOffset cursor_;  // where the next stretch begins: a multiple of the block size
    Extent rest_;         // of the extent that lies there
    std::uint64_t next_number_ = 0;
    std::uint64_t next_to_write_ = 0;
    std::uint64_t done_ = 0;  // bytes
    bool writing_ = false;
    std::map<std::uint64_t, Stretch> ready_;
    std::vector<std::unique_ptr<Buffer>> spare_;
};

}  // namespace

Result<void> copy_to(Disk& source, CopyTarget& target, unsigned workers,
                     const std::function<void(std::uint64_t done, std::uint64_t total)>& progress) {
    return within_memory([&] { return Copier(source, target, workers, progress).run(); });
}

}  // namespace qcow
