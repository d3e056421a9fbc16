#include "luks/luks_image.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/bits.h"
#include "base/try.h"
#include "disk/encrypted.h"
#include "disk/flat_layer.h"
#include "disk/range.h"
#include "format/luks.h"
#include "luks/luks2.h"
#include "luks/volume.h"

namespace qcow::luks {
namespace {

/// Zeros that are written in one request.
constexpr std::size_t zero_bytes = 64 * KiB;

/// What both versions of LUKS say of the data.
struct Volume {
    EncryptionInfo info;
    HostOffset payload;                       // where the data begin
    std::optional<std::uint64_t> bytes = {};  // of data; nothing: up to the end of the file
    std::uint64_t sector_bytes = crypto::sector_unit;
    std::uint64_t first_sector = 0;  // the number of the first sector
};

class LuksImage final : public FlatLayer {
public:
    LuksImage(std::shared_ptr<Storage> storage, Volume volume, std::uint64_t size,
              std::shared_ptr<const crypto::SectorCipher> cipher, std::optional<WriteOptions> write)
        : FlatLayer(std::move(storage), volume.payload, size, write),
          volume_(std::move(volume)),
          encryption_(cipher ? std::make_unique<EncryptedBytes>(std::move(cipher)) : nullptr) {}

    [[nodiscard]] Format format() const override { return Format::luks; }
    [[nodiscard]] Result<void> verify_readable() const override {
        return encryption_ ? Result<void>() : no_key(storage().name());
    }

    Result<Part> read_part(GuestOffset at, Buffers to) const override {
        TRY_VOID(verify_readable());
        const std::size_t there = TRY(encryption_->read(storage(), host(at), position(at), to));
        if (there != to.size()) return was_cut(at + there, to.size() - there);
        return Part{to.size()};
    }

    /// Holes of the file do not decrypt to zeros.
    [[nodiscard]] Result<Extent> own_extent(GuestOffset at, std::uint64_t limit) const override {
        return Extent{.start = at, .length = limit, .kind = Extent::Kind::data};
    }

protected:
    Result<void> write_data(GuestOffset at, ConstBuffers from) override {
        return encryption_->write(storage(), host(at), position(at), from);
    }

    Result<void> zero(GuestOffset at, std::uint64_t length, Zeroes) override {
        static constexpr std::array<std::byte, zero_bytes> zeros = {};
        while (length > 0) {
            const auto piece = std::min<std::uint64_t>(length, zeros.size() - at.value % zeros.size());
            TRY_VOID(write_data(at, std::span(zeros).first(piece)));
            at += piece;
            length -= piece;
        }
        return {};
    }

    /// Whoever sees the file is not to see what of it is in use.
    Result<void> drop(GuestOffset, std::uint64_t) override { return {}; }

    Result<void> do_resize(std::uint64_t size) override {
        if (volume_.bytes || !is_aligned(size, volume_.sector_bytes)) {
            return fail(Errc::unsupported, storage().name(),
                        volume_.bytes
                            ? std::string("its LUKS2 header gives its length, which stays")
                            : fmt::format("its length has to be a multiple of {} bytes", volume_.sector_bytes));
        }
        const auto old = this->size();
        TRY_VOID(FlatLayer::do_resize(size));
        return size > old ? zero({old}, size - old, Zeroes::keep) : Result<void>();
    }

    [[nodiscard]] Result<ImageInfo> do_info() const override {
        auto info = TRY(FlatLayer::do_info());
        info.encryption = volume_.info;
        return info;
    }

private:
    /// See EncryptedBytes. It wraps as the numbers of sectors do.
    [[nodiscard]] std::uint64_t position(GuestOffset at) const {
        return volume_.first_sector * crypto::sector_unit + at.value;
    }

    Volume volume_;
    std::unique_ptr<EncryptedBytes> encryption_;  // null: the key is not known
};

class PendingLuks final : public PendingImage {
public:
    PendingLuks(std::shared_ptr<Storage> storage, Volume volume)
        : storage_(std::move(storage)), volume_(std::move(volume)) {}

    [[nodiscard]] std::optional<std::string> encryption() const override { return "luks"; }

    [[nodiscard]] Result<double> key_seconds() const override {
        if (volume_.info.method == "luks2") return luks2_key_seconds(*storage_);
        return luks::key_seconds({*storage_, {0}, volume_.payload.value});
    }

    Result<std::shared_ptr<Layer>> open(Neighbours neighbours) override {
        std::shared_ptr<const crypto::SectorCipher> cipher;
        if (neighbours.key) cipher = TRY(find_cipher(*neighbours.key, neighbours.max_kdf_seconds));
        if (neighbours.write && !cipher) return no_key(storage_->name());
        const auto there = TRY(storage_->size()) - volume_.payload.value;
        const auto size = volume_.bytes.value_or(align_down(there, volume_.sector_bytes));
        if (size > there) {
            return fail(Errc::corrupt, storage_->name(),
                        fmt::format("its LUKS2 header speaks of {} bytes of data, and the file has {}", size, there));
        }
        return std::make_shared<LuksImage>(storage_, volume_, size, std::move(cipher), neighbours.write);
    }

private:
    [[nodiscard]] Result<std::shared_ptr<const crypto::SectorCipher>> find_cipher(const Secret& key,
                                                                                  double max_seconds) const {
        if (volume_.info.method == "luks2") return unlock_luks2(*storage_, key, max_seconds);
        return unlock({*storage_, {0}, volume_.payload.value}, key, max_seconds);
    }

    std::shared_ptr<Storage> storage_;
    Volume volume_;
};

Result<Volume> read_volume(const Storage& storage) {
    std::array<std::byte, format::luks1_header_bytes> bytes = {};
    const auto start = std::span(bytes).first(TRY(storage.read({0}, bytes)));
    if (format::is_luks2(start)) {
        auto header = TRY(read_luks2(storage));
        return Volume{std::move(header.info), header.data, header.bytes, header.sector_bytes, header.first_sector};
    }
    const auto header = TRY(format::parse_luks1_header(start));
    return Volume{TRY(format::parse_luks1(start)), {std::uint64_t{header.payload_sector} * format::luks_sector_bytes}};
}

}  // namespace

Result<std::unique_ptr<PendingImage>> begin(std::shared_ptr<Storage> storage) {
    auto volume = TRY(read_volume(*storage));
    const auto payload = volume.payload.value;
    if (payload == 0) return fail(Errc::unsupported, "LUKS header", "it is detached: its data lie in another file");
    if (const auto size = TRY(storage->size()); payload > size) {
        return fail(
            Errc::corrupt, "LUKS header",
            fmt::format("the data would begin at offset {:#x}, past the end of the file ({} bytes)", payload, size));
    }
    return std::make_unique<PendingLuks>(std::move(storage), std::move(volume));
}

}  // namespace qcow::luks
