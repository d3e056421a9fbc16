#include "operation/copier.h"

#include <algorithm>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/bits.h"
#include "base/going_on.h"
#include "base/within_memory.h"
#include "base/workers.h"
#include "disk/range.h"
#include "operation/salvage.h"

namespace qcow {
namespace {

/// Small enough that what was read is still in the processor's cache when it is written.
constexpr std::uint64_t min_copied_bytes = 256 * KiB;
constexpr std::size_t buffers_per_worker = 4;

/// A stretch that is not read is at least so long, or there would be too many of them on a vast disk.
constexpr std::uint64_t min_longest_stretch = GiB;
constexpr std::uint64_t max_longest_stretches = 65536;

/// A piece with the memory that it lives in, used again and again.
struct Buffer {
    std::unique_ptr<std::byte[]> memory;
    Piece piece;
};

/// A stretch of the source, numbered in guest order. What was read is in `buffer`; without one, `extent` is zeros, or
/// data for the kernel to copy.
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
    Copier(Disk& source, CopyTarget& target, const CopyOptions& options)
        : source_(source),
          target_(target),
          control_(options.control),
          workers_(options.workers == 0 ? default_workers() : options.workers),
          any_order_(target.any_order()),
          all_is_written_(options.sparse_bytes == 0),
          block_size_(target.block_size()),
          piece_bytes_(std::max({min_copied_bytes, source.block_size(), block_size_})),
          longest_stretch_(align_down(
              std::max({min_longest_stretch, source.size() / max_longest_stretches, block_size_}), block_size_)) {
        if (options.salvage != nullptr) salvager_.emplace(source);
        // What the kernel shares has no storage of its own, and damage would be shared unseen.
        if (all_is_written_ || salvager_) kernel_copies_ = KernelCopies::no;
        for (std::size_t i = 0; i < workers_ * buffers_per_worker; ++i) spare_.push_back(std::make_unique<Buffer>());
    }

    /// What could not be read.
    [[nodiscard]] Losses losses() const { return salvager_->losses(); }

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
    enum class KernelCopies : std::uint8_t { untried, being_tried, yes, no };

    Result<void> work() {
        Lock lock(mutex_);
        while (!failed_) {
            TRY_VOID(verify_goes_on(control_));
            // What the kernel will copy is decided first, or it would be chance which stretches it copies.
            const bool can_read = !spare_.empty() && kernel_copies_ != KernelCopies::being_tried;
            if (!can_read && !can_write()) {
                changed_.wait(lock);
                continue;
            }
            if (can_read) {
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
        if (rest_.start != cursor_ || rest_.length == 0) TRY_VOID(look_ahead());
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
            extent.length = std::min(whole_blocks, longest_stretch_);
            const bool by_kernel = extent.host && kernel_copies_ != KernelCopies::no;
            read = all_is_written_ || (extent.kind == Extent::Kind::data && !by_kernel);
            const bool trial =
                !read && by_kernel && kernel_copies_ == KernelCopies::untried && extent.kind == Extent::Kind::data;
            if (trial) kernel_copies_ = KernelCopies::being_tried;
            // To the next multiple of the piece's size, so that the source's clusters are not cut in two.
            if (read || trial)
                extent.length = std::min(extent.length, piece_bytes_ - (cursor_.value & (piece_bytes_ - 1)));
        }
        if (rest_is_lost_ && !read) salvager_->lose({cursor_, extent.length}, *rest_is_lost_);
        cursor_ += extent.length;
        skip(rest_, std::min(extent.length, rest_.length));
        Stretch stretch{next_number_++, extent, nullptr};
        if (read) {
            stretch.buffer = std::move(spare_.back());
            spare_.pop_back();
        }
        return stretch;
    }

    /// Finds the extent at the cursor. Where that is damaged and the copy goes on all the same, zeros stand in for it.
    Result<void> look_ahead() {
        rest_is_lost_.reset();
        auto found = source_.extent(cursor_, source_.size() - cursor_.value);
        // What fails for a moment is not lost.
        if (!found && salvager_ && found.error().code == Errc::io)
            found = source_.extent(cursor_, source_.size() - cursor_.value);
        if (found) {
            rest_ = *found;
            return {};
        }
        if (!salvager_ || !is_loss(found.error())) return std::unexpected(std::move(found).error());
        const auto& lost = found.error().unreadable;
        rest_ = {.start = cursor_};
        if (lost.start == cursor_ && lost.length != 0) {
            rest_.length = std::min(lost.length, source_.size() - cursor_.value);
            rest_is_lost_ = std::move(found).error();
        } else {
            // How far it goes will be seen when it is read.
            rest_.kind = Extent::Kind::data;
            rest_.length =
                std::min(source_.block_size() - cursor_.value % source_.block_size(), source_.size() - cursor_.value);
        }
        return {};
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
        TRY_VOID(salvager_ ? salvager_->read(at, piece.bytes) : source_.read(at, piece.bytes));
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
            if (stretch.buffer) {
                changed_.notify_all();
                lock.unlock();
                TRY_VOID(target_.complete(stretch.buffer->piece));
                lock.lock();
            }
            if (stretch.buffer) spare_.push_back(std::move(stretch.buffer));
            done_ += stretch.extent.length;
            if (control_.progress) control_.progress(done_, source_.size());
            changed_.notify_all();
        }
        return {};
    }

    Result<void> write(const Stretch& stretch) {
        const auto& extent = stretch.extent;
        if (stretch.buffer) return target_.write(stretch.buffer->piece);
        if (extent.kind != Extent::Kind::data) return target_.write_zeroes(extent.start, extent.length);
        const auto done = TRY(target_.copy_from(extent.start, *extent.storage, *extent.host, extent.length));
        {
            const std::lock_guard lock(mutex_);
            kernel_copies_ = done == extent.length ? KernelCopies::yes : KernelCopies::no;
        }
        return copy_rest(extent, done);
    }

    /// What the kernel did not copy. It will not be asked again.
    Result<void> copy_rest(const Extent& extent, std::uint64_t done) {
        Buffer buffer;
        while (done < extent.length) {
            const std::uint64_t length = std::min(extent.length - done, piece_bytes_);
            TRY_VOID(read(buffer, extent.start + done, length));
            TRY_VOID(target_.write(buffer.piece));
            TRY_VOID(target_.complete(buffer.piece));
            done += length;
        }
        return {};
    }

    Disk& source_;
    CopyTarget& target_;
    const JobControl& control_;
    const unsigned workers_;
    const bool any_order_;
    const bool all_is_written_;  // zeros, too
    const std::uint64_t block_size_;
    const std::uint64_t piece_bytes_;
    const std::uint64_t longest_stretch_;  // that is not read: a request to stop waits for it

    std::mutex mutex_;  // guards all that follows; not held while data are read, prepared or written
    std::condition_variable changed_;
    bool failed_ = false;
    KernelCopies kernel_copies_ = KernelCopies::untried;
    GuestOffset cursor_;                 // where the next stretch begins: a multiple of the block size
    Extent rest_;                        // of the extent that lies there
    std::optional<Error> rest_is_lost_;  // why, where it is damage that reads as zeros
    std::uint64_t next_number_ = 0;
    std::uint64_t next_to_write_ = 0;
    std::uint64_t done_ = 0;  // bytes
    bool writing_ = false;
    std::map<std::uint64_t, Stretch> ready_;
    std::vector<std::unique_ptr<Buffer>> spare_;
    std::optional<Salvager> salvager_;  // has a lock of its own
};

}  // namespace

Result<void> copy_to(Disk& source, CopyTarget& target, const CopyOptions& options) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(source.read({0}, {}));  // what cannot be read is not copied, not even where nothing is stored
        Copier copier(source, target, options);
        auto copied = copier.run();
        if (options.salvage != nullptr) *options.salvage = copier.losses();
        return copied;
    });
}

}  // namespace qcow
