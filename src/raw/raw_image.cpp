#include "raw/raw_image.h"

#include <atomic>

#include "base/try.h"
#include "base/within_memory.h"
#include "disk/range.h"

namespace qcow::raw {
namespace {

HostOffset host(GuestOffset at) { return {at.value}; }

class RawImage final : public Layer {
public:
    RawImage(std::shared_ptr<Storage> storage, std::uint64_t size, std::optional<WriteOptions> write)
        : storage_(std::move(storage)), size_(size), write_(write) {}

    [[nodiscard]] std::uint64_t size() const override { return size_; }
    [[nodiscard]] Format format() const override { return Format::raw; }
    [[nodiscard]] std::uint64_t block_size() const override { return 4 * KiB; }

    Result<void> read(GuestOffset at, std::span<std::byte> to) override {
        return within_memory([&]() -> Result<void> {
            TRY_VOID(verify_range(*this, at, to.size()));
            if (!to.empty()) TRY(read_part(at, to));
            return {};
        });
    }

    Result<Part> read_part(GuestOffset at, std::span<std::byte> to) const override {
        const std::size_t there = TRY(storage_->read(host(at), to));
        if (there != to.size()) return was_cut(at + there, to.size() - there);
        return Part{to.size()};
    }

    Result<Extent> extent(GuestOffset at, std::uint64_t limit) override {
        return within_memory([&]() -> Result<Extent> {
            TRY_VOID(verify_range(*this, at, 1));
            return own_extent(at, std::min(limit, size_ - at.value));
        });
    }

    [[nodiscard]] Result<Extent> own_extent(GuestOffset at, std::uint64_t limit) const override {
        auto run = TRY(storage_->run(host(at), limit));
        if (!run.data) {
            const std::uint64_t end = TRY(storage_->size());
            if (at.value >= end) return was_cut(at, run.length);
            run.length = std::min(run.length, end - at.value);
        }
        Extent result;
        result.start = at;
        result.length = run.length;
        result.kind = run.data ? Extent::Kind::data : Extent::Kind::zero;
        result.host = host(at);
        result.storage = storage_.get();
        return result;
    }

    Result<void> write(GuestOffset at, std::span<const std::byte> from) override {
        return within_memory([&]() -> Result<void> {
            TRY_VOID(verify_writable());
            TRY_VOID(verify_range(*this, at, from.size()));
            if (write_->detect_zeroes != DetectZeroes::off && is_zero(from)) {
                return write_zeroes(at, from.size(),
                                    write_->detect_zeroes == DetectZeroes::on ? Zeroes::keep : Zeroes::release);
            }
            TRY_VOID(storage_->write(host(at), from));
            return written();
        });
    }

    Result<void> write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes) override {
        return within_memory([&]() -> Result<void> {
            TRY_VOID(verify_writable());
            TRY_VOID(verify_range(*this, at, length));
            TRY_VOID(storage_->write_zeroes(host(at), length));
            if (zeroes == Zeroes::keep) TRY_VOID(storage_->allocate(host(at), length));
            return written();
        });
    }

    Result<void> discard(GuestOffset at, std::uint64_t length) override {
        TRY_VOID(verify_writable());
        TRY_VOID(verify_range(*this, at, length));
        const GuestOffset begin{divide_up(at.value, block_size()) * block_size()};
        const GuestOffset end{at.value + length == size() ? size() : align_down(at.value + length, block_size())};
        if (!write_->discard || begin >= end) return {};
        return write_zeroes(begin, end - begin, Zeroes::release);
    }

    Result<void> resize(std::uint64_t size, Shrink shrink) override {
        return within_memory([&]() -> Result<void> {
            TRY_VOID(verify_writable());
            size = rounded_size(size);
            if (size < size_ && shrink == Shrink::refuse) return refuse_to_shrink(*this, size);
            TRY_VOID(storage_->resize(size));
            size_ = size;
            return {};
        });
    }

    Result<std::uint64_t> copy_from(GuestOffset at, const Storage& source, HostOffset from,
                                    std::uint64_t length) override {
        TRY_VOID(verify_writable());
        TRY_VOID(verify_range(*this, at, length));
        return storage_->copy_from(source, from, host(at), length);
    }

    Result<void> flush() override {
        return within_memory(
            [&] { return write_ && write_->cache != CacheMode::unsafe ? storage_->flush() : Result<void>(); });
    }

    Result<void> close() override {
        TRY_VOID(flush());
        write_.reset();
        return {};
    }

    [[nodiscard]] std::vector<std::string> files() const override { return {storage_->name()}; }

    [[nodiscard]] Result<ImageInfo> info() const override {
        ImageInfo info;
        info.filename = storage_->name();
        info.format = Format::raw;
        info.virtual_size = size_;
        info.file_size = TRY(storage_->size());
        info.disk_size = TRY(storage_->allocated());
        return info;
    }

private:
    /// The file has become shorter since it was opened: what it had there is not zeros.
    [[nodiscard]] std::unexpected<Error> was_cut(GuestOffset at, std::uint64_t length) const {
        return unreadable({Errc::io, storage_->name(),
                           fmt::format("it ends before offset {:#x}, although it had {} bytes when it was opened",
                                       at.value, size_.load())},
                          at, length);
    }

    [[nodiscard]] Result<void> verify_writable() const {
        if (!write_) return fail(Errc::read_only, storage_->name(), "opened for reading only");
        return {};
    }

    Result<void> written() { return write_->cache == CacheMode::writethrough ? flush() : Result<void>(); }

    std::shared_ptr<Storage> storage_;
    std::atomic<std::uint64_t> size_;
    std::optional<WriteOptions> write_;  // nothing: read-only, or closed
};

class PendingRaw final : public PendingImage {
public:
    explicit PendingRaw(std::shared_ptr<Storage> storage) : storage_(std::move(storage)) {}

    Result<std::shared_ptr<Layer>> open(Neighbours neighbours) override {
        const auto size = TRY(storage_->size());
        return std::make_shared<RawImage>(storage_, size, neighbours.write);
    }

private:
    std::shared_ptr<Storage> storage_;
};

}  // namespace

Result<std::unique_ptr<PendingImage>> begin(std::shared_ptr<Storage> storage) {
    return std::make_unique<PendingRaw>(std::move(storage));
}

}  // namespace qcow::raw
