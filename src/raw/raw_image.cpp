#include "raw/raw_image.h"

#include <atomic>

#include "base/try.h"
#include "disk/range.h"

namespace qcow::raw {
namespace {

HostOffset host(GuestOffset at) { return {at.value}; }

class RawImage final : public Layer {
public:
    RawImage(std::shared_ptr<Storage> storage, std::uint64_t size, std::optional<WriteOptions> write)
        : storage_(std::move(storage)), size_(size) {
        write_with(write);
    }

    [[nodiscard]] std::uint64_t size() const override { return size_; }
    [[nodiscard]] Format format() const override { return Format::raw; }
    [[nodiscard]] std::uint64_t block_size() const override { return 4 * KiB; }
    [[nodiscard]] std::vector<std::string> files() const override { return {storage_->name()}; }

    Result<Part> read_part(GuestOffset at, Buffers to) const override {
        const std::size_t there = TRY(storage_->read(host(at), to));
        if (there != to.size()) return was_cut(at + there, to.size() - there);
        return Part{to.size()};
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

protected:
    Result<void> do_read(GuestOffset at, Buffers to) override {
        if (!to.empty()) TRY(read_part(at, to));
        return {};
    }
    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override { return own_extent(at, limit); }

    Result<void> write_data(GuestOffset at, ConstBuffers from) override { return storage_->write(host(at), from); }

    Result<void> zero(GuestOffset at, std::uint64_t length, Zeroes zeroes) override {
        TRY_VOID(storage_->write_zeroes(host(at), length));
        return zeroes == Zeroes::keep ? storage_->allocate(host(at), length) : Result<void>();
    }

    Result<void> drop(GuestOffset at, std::uint64_t length) override {
        return storage_->write_zeroes(host(at), length);
    }

    Result<void> do_resize(std::uint64_t size) override {
        TRY_VOID(storage_->resize(size));
        size_ = size;
        return {};
    }

    Result<std::uint64_t> do_copy_from(GuestOffset at, const Storage& source, HostOffset from,
                                       std::uint64_t length) override {
        return storage_->copy_from(source, from, host(at), length);
    }

    Result<void> do_flush() override {
        return write_options() && write_options()->cache != CacheMode::unsafe ? storage_->flush() : Result<void>();
    }

    Result<void> do_close() override {
        TRY_VOID(do_flush());
        write_with({});
        return {};
    }

    [[nodiscard]] Result<ImageInfo> do_info() const override {
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

    std::shared_ptr<Storage> storage_;
    std::atomic<std::uint64_t> size_;
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
