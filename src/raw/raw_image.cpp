#include "raw/raw_image.h"

#include "base/try.h"
#include "disk/range.h"

namespace qcow::raw {
namespace {

HostOffset host(GuestOffset at) { return {at.value}; }

class RawImage final : public Image {
public:
    RawImage(std::shared_ptr<Storage> storage, std::uint64_t size) : storage_(std::move(storage)), size_(size) {}

    [[nodiscard]] std::uint64_t size() const override { return size_; }
    [[nodiscard]] Format format() const override { return Format::raw; }
    [[nodiscard]] std::uint64_t block_size() const override { return 4 * KiB; }

    Result<void> read(GuestOffset at, std::span<std::byte> to) override {
        TRY_VOID(verify_range(*this, at, to.size()));
        TRY(storage_->read(host(at), to));
        return {};
    }

    Result<Extent> extent(GuestOffset at, std::uint64_t limit) override {
        TRY_VOID(verify_range(*this, at, 1));
        const auto run = TRY(storage_->run(host(at), std::min(limit, size_ - at.value)));
        Extent result;
        result.start = at;
        result.length = run.length;
        result.kind = run.data ? Extent::Kind::data : Extent::Kind::zero;
        result.host = host(at);
        result.storage = storage_.get();
        return result;
    }

    Result<void> write(GuestOffset at, std::span<const std::byte> from) override {
        TRY_VOID(verify_range(*this, at, from.size()));
        return storage_->write(host(at), from);
    }

    Result<void> write_zeroes(GuestOffset at, std::uint64_t length) override {
        TRY_VOID(verify_range(*this, at, length));
        return storage_->write_zeroes(host(at), length);
    }

    Result<std::uint64_t> copy_from(GuestOffset at, const Storage& source, HostOffset from,
                                    std::uint64_t length) override {
        TRY_VOID(verify_range(*this, at, length));
        return storage_->copy_from(source, from, host(at), length);
    }

    Result<void> flush() override { return storage_->flush(); }

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
    std::shared_ptr<Storage> storage_;
    std::uint64_t size_;
};

class PendingRaw final : public PendingImage {
public:
    explicit PendingRaw(std::shared_ptr<Storage> storage) : storage_(std::move(storage)) {}

    Result<std::shared_ptr<Image>> open(Neighbours) override {
        const auto size = TRY(storage_->size());
        return std::make_shared<RawImage>(storage_, size);
    }

private:
    std::shared_ptr<Storage> storage_;
};

}  // namespace

Result<std::unique_ptr<PendingImage>> begin(std::shared_ptr<Storage> storage) {
    return std::make_unique<PendingRaw>(std::move(storage));
}

}  // namespace qcow::raw
