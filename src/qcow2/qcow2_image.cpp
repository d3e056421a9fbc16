#include "qcow2/qcow2_image.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <shared_mutex>
#include <utility>

#include "disk/range.h"
#include "format/file_name.h"
#include "format/luks.h"
#include "luks/volume.h"
#include "qcow/text.h"
#include "qcow2/bitmap_runs.h"
#include "qcow2/image_check.h"
#include "qcow2/known_bitmaps.h"
#include "qcow2/metadata/directories.h"
#include "qcow2/view.h"
#include "qcow2/writer.h"

namespace qcow::qcow2 {
namespace {

/// A snapshot as a disk. It shares the image's cache and keeps everything open that it needs.
class SnapshotDisk final : public Disk {
public:
    SnapshotDisk(std::shared_ptr<const ImageParts> parts, const format::SnapshotEntry& snapshot,
                 OpenSnapshots::Removed removed)
        : parts_(std::move(parts)),
          view_(parts_, snapshot.l1_table),
          size_(snapshot.info.virtual_size),
          name_(snapshot.info.name),
          removed_(std::move(removed)) {}

    [[nodiscard]] std::uint64_t size() const override { return size_; }
    [[nodiscard]] std::uint64_t block_size() const override { return parts_->metadata.cluster_size(); }

protected:
    Result<void> do_read(GuestOffset at, Buffers to) override {
        const Epochs::Guard guard(parts_->metadata.epochs());
        TRY_VOID(verify_exists());
        return view_.read(at, to);
    }

    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        const Epochs::Guard guard(parts_->metadata.epochs());
        TRY_VOID(verify_exists());
        return view_.extent(at, limit);
    }

private:
    [[nodiscard]] Result<void> verify_exists() const {
        if (!*removed_) return {};
        return fail(Errc::not_found, parts_->metadata.file().name(),
                    fmt::format("snapshot \"{}\" was removed", printable(name_)));
    }

    std::shared_ptr<const ImageParts> parts_;
    View view_;
    std::uint64_t size_;
    std::string name_;
    OpenSnapshots::Removed removed_;
};

Result<EncryptionInfo> encryption_info(const Metadata& metadata) {
    if (metadata.header().crypt == format::Crypt::aes) return EncryptionInfo{"aes", "aes-cbc-plain64", "", 128, 0, {}};
    std::array<std::byte, format::luks1_header_bytes> bytes = {};
    const auto there = TRY(metadata.file().read(metadata.header().encryption->offset, bytes));
    auto info = format::parse_luks1(std::span(bytes).first(there));
    if (!info) return std::unexpected(std::move(info).error().in(metadata.file().name()));
    return info;
}

/// A reference as the image has it, and what it comes to if it can be understood.
ReferenceInfo reference_info(FileReference::Role role, const std::string& name,
                             const std::optional<std::string>& format, const Metadata& metadata) {
    ReferenceInfo info{name, "", format.value_or("")};
    if (const auto parsed = format::parse_file_name(name, role))
        info.path = format::resolve(parsed->path, metadata.file().name());
    return info;
}

class Qcow2Image final : public Layer {
public:
    explicit Qcow2Image(std::shared_ptr<ImageParts> parts)
        : parts_(std::move(parts)), metadata_(parts_->metadata), active_(parts_), bitmaps_(metadata_) {}

    ~Qcow2Image() override { static_cast<void>(close()); }

    Result<void> open_for_writing(const WriteOptions& options) {
        auto writer = std::make_unique<Writer>(parts_, active_, options);
        TRY_VOID(writer->open());
        writer_ = std::move(writer);
        write_with(options);
        return {};
    }

    Result<void> expand_zeroes() { return writer_->expand_zeroes(); }
    Result<void> complete_snapshots() { return writer_->complete_snapshots(); }
    Result<void> copy_up(GuestOffset at, std::span<const std::byte> seen, Stored stored, std::optional<int> level) {
        constexpr auto stay = Writer::Contents::stay;
        switch (stored) {
            case Stored::plain: return writer_->write(at, seen, stay);
            case Stored::compressed: return writer_->write_compressed(at, seen, level, stay);
            case Stored::zeros: return writer_->write_zeroes(at, seen.size(), Zeroes::release, stay);
        }
        std::unreachable();
    }

    [[nodiscard]] std::uint64_t size() const override { return metadata_.disk_size(); }
    [[nodiscard]] Format format() const override { return Format::qcow2; }
    [[nodiscard]] std::uint64_t block_size() const override { return metadata_.header().cluster_size(); }
    [[nodiscard]] std::shared_ptr<Image> backing() const override { return parts_->backing.image(); }
    [[nodiscard]] const BackingFile* backing_file() const override { return &parts_->backing; }
    void exchange_backing(std::shared_ptr<Layer> image) override { parts_->backing.exchange(std::move(image)); }
    [[nodiscard]] Result<void> verify_readable() const override { return active_.verify_readable(); }

    // Only the topmost layer of a chain is written, and these are asked of those below it.
    Result<Part> read_part(GuestOffset at, Buffers to) const override { return active_.read_part(at, to); }
    [[nodiscard]] Result<Extent> own_extent(GuestOffset at, std::uint64_t limit) const override {
        return active_.own_extent(at, limit);
    }

    [[nodiscard]] std::vector<std::string> files() const override {
        std::vector<std::string> names = {metadata_.file().name()};
        if (parts_->data.is_external() && parts_->data.is_open()) names.push_back(parts_->data.storage()->name());
        return names;
    }

protected:
    Result<void> do_read(GuestOffset at, Buffers to) override {
        if (!writer_) return active_.read(at, to);
        const Epochs::Guard guard(writer_->epochs());
        return active_.read(at, to);
    }

    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        if (!writer_) return active_.extent(at, limit);
        const Epochs::Guard guard(writer_->epochs());
        return active_.extent(at, limit);
    }

    Result<void> write_data(GuestOffset at, ConstBuffers from) override { return writer_->write(at, from); }
    Result<void> zero(GuestOffset at, std::uint64_t length, Zeroes zeroes) override {
        return writer_->write_zeroes(at, length, zeroes);
    }
    Result<void> drop(GuestOffset at, std::uint64_t length) override { return writer_->discard(at, length); }
    Result<void> write_compressed_data(GuestOffset at, std::span<const std::byte> from,
                                       std::optional<int> level) override {
        return writer_->write_compressed(at, from, level);
    }

    Result<void> do_change_backing(const std::string& name, std::optional<Format> format) override {
        return writer_->change_backing(name, format);
    }

    Result<void> do_change_bitmaps(std::span<const BitmapAction> actions) override {
        std::vector<BitmapAction> own(actions.begin(), actions.end());
        for (auto& action : own) {
            if (action.source_image.get() == this) action.source_image = nullptr;
        }
        const std::unique_lock lock(bitmaps_mutex_);
        auto changed = writer_->change_bitmaps(own);
        bitmaps_.forget();
        return changed;
    }

    Result<void> do_make_empty() override { return writer_->make_empty(); }

    Result<void> do_flush() override { return writer_ ? writer_->flush() : Result<void>(); }

    Result<void> do_survive_in(SurvivingMemory memory) override {
        return writer_ ? writer_->survive_in(std::move(memory)) : Result<void>();
    }

    Result<void> do_resize(std::uint64_t size) override {
        const std::unique_lock lock(bitmaps_mutex_);
        auto resized = writer_->resize(size);
        bitmaps_.forget();
        return resized;
    }

    Result<void> do_close() override {
        if (!writer_) return {};
        auto settled = writer_->settle();
        if (settled) settled = writer_->cut_file();
        write_with({});
        writer_.reset();
        bitmaps_.forget();
        return settled;
    }

    Result<std::shared_ptr<Disk>> do_open_snapshot(std::string_view id_or_name) override {
        const Epochs::Guard guard(metadata_.epochs());
        for (;;) {
            const HostOffset table_at = metadata_.state().snapshot_table;
            const auto table = TRY(read_snapshots(metadata_));
            const auto found = find_snapshots(table.entries, id_or_name);
            if (found.empty()) {
                return fail(
                    Errc::not_found, metadata_.file().name(),
                    fmt::format("there is no snapshot \"{}\"; snapshot --list shows those that there are", id_or_name));
            }
            const auto& entry = table.entries[found.front()];
            TRY_VOID(verify_snapshot_l1(metadata_, entry));
            auto removed = parts_->open_snapshots.open(entry.l1_table);
            // Whoever removes it from now on tells of it.
            if (metadata_.state().snapshot_table == table_at)
                return std::make_shared<SnapshotDisk>(parts_, entry, std::move(removed));
        }
    }

    Result<std::vector<SnapshotInfo>> do_list_snapshots() const override {
        const Epochs::Guard guard(metadata_.epochs());
        std::vector<SnapshotInfo> list;
        for (auto& entry : TRY(read_snapshots(metadata_)).entries) list.push_back(std::move(entry.info));
        return list;
    }

    Result<SnapshotInfo> do_create_snapshot(const std::string& name) override { return writer_->create_snapshot(name); }

    Result<void> do_apply_snapshot(std::string_view id_or_name) override {
        const std::unique_lock lock(bitmaps_mutex_);
        auto applied = writer_->apply_snapshot(id_or_name);
        bitmaps_.forget();
        return applied;
    }

    Result<void> do_remove_snapshot(std::string_view id_or_name) override {
        return writer_->remove_snapshot(id_or_name);
    }

    Result<void> do_rename_snapshot(std::string_view id_or_name, const std::string& name) override {
        return writer_->rename_snapshot(id_or_name, name);
    }

    Result<void> do_each_dirty(std::string_view bitmap, GuestOffset begin, std::uint64_t length,
                               const std::function<Result<void>(const DirtyRun&)>& visit) override {
        const std::shared_lock lock(bitmaps_mutex_);
        TRY_VOID(verify_range(*this, begin, length));
        const auto* found = TRY(bitmaps_.find(bitmap));
        const auto* recorded = writer_ ? writer_->bitmaps().recorded(found->index) : nullptr;
        const bool forgotten = writer_ && writer_->bitmaps().forgotten(found->index);
        if (forgotten || (found->entry.info.in_use && recorded == nullptr)) {
            return fail(Errc::corrupt, metadata_.file().name(),
                        fmt::format("bitmap \"{}\" is in use: a writer did not save it, so its bits cannot be trusted; "
                                    "remove it and make a new one",
                                    printable(bitmap)));
        }
        TRY_VOID(verify_bitmap(metadata_, found->entry));
        return each_dirty_run(metadata_, found->entry, recorded, begin, length, visit);
    }

    Result<CheckReport> do_check(const CheckOptions& options) override {
        if (writer_) TRY_VOID(writer_->settle());
        return check_image(metadata_, parts_->data.storage(), options);
    }

    [[nodiscard]] Result<ImageInfo> do_info() const override {
        const auto& header = metadata_.header();
        const auto state = metadata_.state();
        ImageInfo info;
        info.filename = metadata_.file().name();
        info.format = Format::qcow2;
        info.virtual_size = state.size;
        info.file_size = TRY(metadata_.file().size());
        info.disk_size = TRY(metadata_.file().allocated());
        info.version = header.version;
        info.cluster_size = header.cluster_size();
        info.compression = header.compression == Compression::zstd ? "zstd" : "zlib";
        info.refcount_bits = 1U << header.refcount_order;
        info.dirty = state.has(format::incompatible::dirty);
        info.corrupt = state.has(format::incompatible::corrupt);
        info.lazy_refcounts = (state.compatible & format::compatible::lazy_refcounts) != 0;
        info.extended_l2 = metadata_.geometry().extended_l2;
        info.features = format::features_of(header, state);
        if (!header.backing_name.empty()) {
            info.backing = reference_info(FileReference::Role::backing_file, header.backing_name, header.backing_format,
                                          metadata_);
        }
        if (metadata_.rules().external_data) {
            info.data_file =
                reference_info(FileReference::Role::data_file, header.data_file_name.value_or(""), "raw", metadata_);
        }
        info.data_file_raw =
            metadata_.rules().external_data && (state.autoclear & format::autoclear::raw_external_data) != 0;
        if (header.crypt != format::Crypt::none) {
            info.encryption.emplace();
            info.encryption->method = header.crypt == format::Crypt::luks ? "luks" : "aes";
            if (auto encryption = encryption_info(metadata_)) {
                info.encryption = *std::move(encryption);
            } else {
                info.encryption_error = std::move(encryption).error();
            }
        }
        if (auto snapshots = do_list_snapshots()) {
            info.snapshots = *std::move(snapshots);
        } else {
            info.snapshots_error = std::move(snapshots).error();
        }
        // The directory and what it leads to are not reused while it is read.
        const Epochs::Guard guard(metadata_.epochs());
        if (auto bitmaps = read_bitmaps(metadata_)) {
            for (auto& bitmap : *bitmaps) info.bitmaps.push_back(std::move(bitmap.info));
        } else {
            info.bitmaps_error = std::move(bitmaps).error();
        }
        info.bitmaps_stale = state.bitmaps && !state.bitmaps_consistent();
        for (const auto& extension : header.unknown_extensions)
            info.unknown_extensions.push_back({extension.type, extension.bytes});
        return info;
    }

private:
    std::shared_ptr<ImageParts> parts_;
    Metadata& metadata_;
    View active_;
    std::shared_mutex bitmaps_mutex_;  // held alone while their size changes
    KnownBitmaps bitmaps_;
    std::unique_ptr<Writer> writer_;  // null: read-only
};

class PendingQcow2 final : public PendingImage {
public:
    PendingQcow2(std::shared_ptr<Storage> storage, format::Header header)
        : storage_(std::move(storage)), header_(std::move(header)) {}

    [[nodiscard]] std::optional<Backing> backing() const override {
        if (header_.backing_name.empty()) return std::nullopt;
        return Backing{header_.backing_name, header_.backing_format};
    }

    [[nodiscard]] std::optional<std::string> data_file() const override {
        if (!header_.has(format::incompatible::external_data)) return std::nullopt;
        return header_.data_file_name.value_or("");
    }

    [[nodiscard]] std::optional<std::string> encryption() const override {
        if (header_.crypt == format::Crypt::none) return std::nullopt;
        return header_.crypt == format::Crypt::aes ? "aes" : "luks";
    }

    [[nodiscard]] Result<double> key_seconds() const override {
        if (!header_.encryption) return 0.0;
        return luks::key_seconds({*storage_, header_.encryption->offset, header_.encryption->length});
    }

    Result<std::shared_ptr<Layer>> open(Neighbours neighbours) override {
        std::shared_ptr<const crypto::SectorCipher> cipher;
        if (neighbours.key) cipher = TRY(unlock(header_, *storage_, *neighbours.key, neighbours.max_kdf_seconds));
        auto backing_name = neighbours.alone ? std::string() : header_.backing_name;
        auto parts = std::make_shared<ImageParts>(header_, std::move(storage_), neighbours.data_file,
                                                  std::move(neighbours.backing), std::move(backing_name),
                                                  neighbours.cache_bytes, std::move(cipher));
        auto image = std::make_shared<Qcow2Image>(std::move(parts));
        if (neighbours.write) TRY_VOID(image->open_for_writing(*neighbours.write));
        return image;
    }

private:
    std::shared_ptr<Storage> storage_;
    format::Header header_;
};

}  // namespace

Result<std::unique_ptr<PendingImage>> begin(std::shared_ptr<Storage> storage) {
    auto header = TRY(format::parse_header(TRY(read_first_cluster(*storage))));
    return std::make_unique<PendingQcow2>(std::move(storage), std::move(header));
}

Result<void> complete_snapshots(Image& image) {
    return within_memory([&] { return dynamic_cast<Qcow2Image&>(image).complete_snapshots(); });
}

Result<void> expand_zeroes(Image& image) {
    return within_memory([&] { return dynamic_cast<Qcow2Image&>(image).expand_zeroes(); });
}

Result<void> copy_up(Image& image, GuestOffset at, std::span<const std::byte> seen, Stored stored,
                     std::optional<int> level) {
    return within_memory([&] { return dynamic_cast<Qcow2Image&>(image).copy_up(at, seen, stored, level); });
}

}  // namespace qcow::qcow2
