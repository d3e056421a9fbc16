#include "raw/raw_image.h"

#include "base/try.h"
#include "disk/flat_layer.h"

namespace qcow::raw {
namespace {

class RawImage final : public FlatLayer {
public:
    RawImage(std::shared_ptr<Storage> storage, std::uint64_t size, std::optional<WriteOptions> write)
        : FlatLayer(std::move(storage), {0}, size, write) {}

    [[nodiscard]] Format format() const override { return Format::raw; }

    Result<Part> read_part(GuestOffset at, Buffers to) const override {
        const std::size_t there = TRY(storage().read(host(at), to));
        if (there != to.size()) return was_cut(at + there, to.size() - there);
        return Part{to.size()};
    }

    [[nodiscard]] Result<Extent> own_extent(GuestOffset at, std::uint64_t limit) const override {
        auto run = TRY(storage().run(host(at), limit));
        if (!run.data) {
            const std::uint64_t end = TRY(storage().size());
            if (at.value >= end) return was_cut(at, run.length);
            run.length = std::min(run.length, end - at.value);
        }
        Extent result;
        result.start = at;
        result.length = run.length;
        result.kind = run.data ? Extent::Kind::data : Extent::Kind::zero;
        result.host = host(at);
        result.storage = &storage();
        return result;
    }

protected:
    Result<void> write_data(GuestOffset at, ConstBuffers from) override { return storage().write(host(at), from); }

    Result<void> zero(GuestOffset at, std::uint64_t length, Zeroes zeroes) override {
        TRY_VOID(storage().write_zeroes(host(at), length));
        return zeroes == Zeroes::keep ? storage().allocate(host(at), length) : Result<void>();
    }

    Result<void> drop(GuestOffset at, std::uint64_t length) override {
        return storage().write_zeroes(host(at), length);
    }

    Result<std::uint64_t> do_copy_from(GuestOffset at, const Storage& source, HostOffset from,
                                       std::uint64_t length) override {
        return storage().copy_from(source, from, host(at), length);
    }
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
