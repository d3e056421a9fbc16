#include "qcow2/image.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/try.h"
#include "disk/range.h"
#include "format/file_name.h"
#include "format/luks.h"
#include "qcow/text.h"
#include "qcow2/check.h"
#include "qcow2/tables.h"
#include "qcow2/view.h"

namespace qcow::qcow2 {
namespace {

/// A snapshot as a disk. It shares the image's cache and keeps everything open that it needs.
class SnapshotDisk final : public Disk {
public:
    SnapshotDisk(const std::shared_ptr<const Core>& core, const format::SnapshotEntry& snapshot)
        : view_(core, snapshot.l1_table), size_(snapshot.info.virtual_size), block_size_(core->header.cluster_size()) {}

    [[nodiscard]] std::uint64_t size() const override { return size_; }
    [[nodiscard]] std::uint64_t block_size() const override { return block_size_; }

    Result<void> read(GuestOffset at, std::span<std::byte> to) override {
        TRY_VOID(verify_range(*this, at, to.size()));
        return view_.read(at, to);
    }

    Result<Extent> extent(GuestOffset at, std::uint64_t limit) override {
        TRY_VOID(verify_range(*this, at, 1));
        return view_.extent(at, std::min(limit, size_ - at.value));
    }

private:
    View view_;
    std::uint64_t size_;
    std::uint64_t block_size_;
};

Result<EncryptionInfo> encryption_info(const Core& core) {
    if (core.header.crypt == format::Crypt::aes) return EncryptionInfo{"aes", "aes-cbc-plain64", "", 128, 0, {}};
    std::array<std::byte, format::luks1_header_bytes> bytes = {};
    const auto there = TRY(core.file->read(core.header.encryption->offset, bytes));
    auto info = format::parse_luks1(std::span(bytes).first(there));
    if (!info) return std::unexpected(std::move(info).error().in(core.file->name()));
    return info;
}

/// A reference as the image has it, and what it comes to if it can be understood.
ReferenceInfo reference_info(const std::string& name, const std::optional<std::string>& format, const Core& core) {
    ReferenceInfo info{name, "", format.value_or("")};
    if (const auto parsed = format::parse_file_name(name)) info.path = format::resolve(parsed->path, core.file->name());
    return info;
}

class Qcow2Image final : public Image {
public:
    explicit Qcow2Image(std::shared_ptr<const Core> core)
        : core_(std::move(core)), active_(core_, core_->header.l1_table) {}

    [[nodiscard]] std::uint64_t size() const override { return core_->header.size; }
    [[nodiscard]] Format format() const override { return Format::qcow2; }
    [[nodiscard]] std::uint64_t block_size() const override { return core_->header.cluster_size(); }
    [[nodiscard]] std::shared_ptr<Image> backing() const override { return core_->below.image(); }

    Result<void> read(GuestOffset at, std::span<std::byte> to) override {
        TRY_VOID(verify_range(*this, at, to.size()));
        return active_.read(at, to);
    }

    Result<Extent> extent(GuestOffset at, std::uint64_t limit) override {
        TRY_VOID(verify_range(*this, at, 1));
        return active_.extent(at, std::min(limit, size() - at.value));
    }

    Result<std::shared_ptr<Disk>> snapshot(std::string_view id_or_name) override {
        const auto table = TRY(read_snapshots(*core_));
        auto found = std::ranges::find_if(table.entries, [&](const auto& s) { return s.info.id == id_or_name; });
        if (found == table.entries.end())
            found = std::ranges::find_if(table.entries, [&](const auto& s) { return s.info.name == id_or_name; });
        if (found == table.entries.end()) {
            return fail(
                Errc::not_found, core_->file->name(),
                fmt::format("there is no snapshot \"{}\"; snapshot --list shows those that there are", id_or_name));
        }
        TRY_VOID(verify_snapshot_l1(*core_, *found));
        return std::make_shared<SnapshotDisk>(core_, *found);
    }

    Result<CheckReport> check(const CheckOptions& options) override { return check_image(*core_, options); }

    [[nodiscard]] Result<ImageInfo> info() const override {
        const auto& header = core_->header;
        ImageInfo info;
        info.filename = core_->file->name();
        info.format = Format::qcow2;
        info.virtual_size = header.size;
        info.file_size = TRY(core_->file->size());
        info.disk_size = TRY(core_->file->allocated());
        info.version = header.version;
        info.cluster_size = header.cluster_size();
        info.compression = header.compression == Compression::zstd ? "zstd" : "zlib";
        info.refcount_bits = 1U << header.refcount_order;
        info.dirty = header.has(format::incompatible::dirty);
        info.corrupt = header.has(format::incompatible::corrupt);
        info.lazy_refcounts = (header.compatible & format::compatible::lazy_refcounts) != 0;
        info.extended_l2 = core_->rules.geometry.extended_l2;
        info.features = format::features_of(header);
        if (!header.backing_name.empty())
            info.backing = reference_info(header.backing_name, header.backing_format, *core_);
        if (core_->rules.external_data)
            info.data_file = reference_info(header.data_file_name.value_or(""), "raw", *core_);
        info.data_file_raw =
            core_->rules.external_data && (header.autoclear & format::autoclear::raw_external_data) != 0;
        if (header.crypt != format::Crypt::none) info.encryption = TRY(encryption_info(*core_));
        for (auto& snapshot : TRY(read_snapshots(*core_)).entries) info.snapshots.push_back(std::move(snapshot.info));
        for (auto& bitmap : TRY(read_bitmaps(*core_))) info.bitmaps.push_back(std::move(bitmap.info));
        info.bitmaps_stale = header.bitmaps && !header.bitmaps_consistent();
        for (const auto& extension : header.unknown_extensions) {
            info.unknown_extensions.push_back({extension.type, static_cast<std::uint32_t>(extension.data.size())});
        }
        return info;
    }

private:
    std::shared_ptr<const Core> core_;
    View active_;
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

    Result<std::shared_ptr<Image>> open(Neighbours neighbours) override {
        return std::make_shared<Qcow2Image>(
            std::make_shared<const Core>(std::move(header_), std::move(storage_), std::move(neighbours.data_file),
                                         std::move(neighbours.backing), neighbours.cache_bytes));
    }

private:
    std::shared_ptr<Storage> storage_;
    format::Header header_;
};

}  // namespace

Result<std::unique_ptr<PendingImage>> begin(std::shared_ptr<Storage> storage) {
    std::vector<std::byte> bytes(format::fixed_header_v2);
    bytes.resize(TRY(storage->read({0}, bytes)));
    bytes.resize(TRY(format::header_bytes(bytes)));
    bytes.resize(TRY(storage->read({0}, bytes)));
    auto header = TRY(format::parse_header(bytes, TRY(storage->size())));
    return std::make_unique<PendingQcow2>(std::move(storage), std::move(header));
}

}  // namespace qcow::qcow2
