#include "qcow2/view.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/try.h"
#include "codec/codec.h"
#include "disk/compressed.h"
#include "disk/range.h"
#include "qcow2/file_end.h"

namespace qcow::qcow2 {

using format::ClusterKind;

Result<void> View::verify_readable() const {
    if (core_->header.crypt != format::Crypt::none) {
        return fail(Errc::encrypted, core_->file->name(),
                    fmt::format("the image is encrypted ({}), and reading encrypted images is not supported yet; its "
                                "metadata can be examined",
                                core_->header.crypt == format::Crypt::luks ? "LUKS" : "AES"));
    }
    if (!core_->data) {
        return fail(Errc::not_found, core_->file->name(),
                    "its data lie in an external data file, which was not opened");
    }
    return {};
}

Result<Mapped> View::lookup(GuestOffset at, std::uint64_t limit) const {
    auto mapped = mapping_.lookup(at, limit);
    if (!mapped && mapped.error().code == Errc::corrupt && on_damage_) return on_damage_(std::move(mapped).error());
    return mapped;
}

Result<void> View::read(GuestOffset at, std::span<std::byte> to) const {
    TRY_VOID(verify_readable());
    if (to.empty()) return core_->below.verify_readable();
    while (!to.empty()) {
        const auto part = TRY(read_part(at, to));
        if (!part.held) TRY_VOID(core_->below.read(at, to.first(part.length)));
        at += part.length;
        to = to.subspan(part.length);
    }
    return {};
}

Result<Layer::Part> View::read_part(GuestOffset at, std::span<std::byte> to) const {
    TRY_VOID(verify_readable());
    const auto mapped = TRY(lookup(at, to.size()));
    std::uint64_t length = mapped.length;
    if (mapped.kind == ClusterKind::compressed) {
        const auto& geometry = core_->rules.geometry;
        length = std::min(length, geometry.cluster_size() - geometry.offset_in_cluster(at.value));
    }
    const auto part = to.first(length);
    switch (mapped.kind) {
        case ClusterKind::data: TRY_VOID(read_data(mapped.host, at, part)); break;
        case ClusterKind::compressed: TRY_VOID(read_one_compressed(mapped, at, part)); break;
        case ClusterKind::unallocated: return Layer::Part{length, false};
        case ClusterKind::zero:
        case ClusterKind::zero_allocated: std::memset(part.data(), 0, part.size()); break;
    }
    return Layer::Part{length};
}

Result<void> View::read_data(HostOffset host, GuestOffset at, std::span<std::byte> to) const {
    const std::size_t there = TRY(core_->data->read(host, to));
    if (there == to.size()) return {};
    const auto& geometry = core_->rules.geometry;
    std::uint64_t file_end = TRY(core_->data->size());
    // The last cluster of an image file need not be there to its end.
    if (!core_->rules.external_data) file_end = geometry.clusters(file_end) * geometry.cluster_size();
    if (host.value + to.size() <= file_end) return {};
    const std::uint64_t in_file = file_end - std::min(host.value, file_end);
    const auto thing = fmt::format("the data of guest offset {:#x}", at.value + there);
    return unreadable({Errc::corrupt, core_->data->name(), past_the_end(*core_, *core_->data, thing, host + there)},
                      at + in_file, to.size() - in_file);
}

Result<void> View::read_one_compressed(const Mapped& mapped, GuestOffset at, std::span<std::byte> to) const {
    const auto decompress = core_->header.compression == Compression::zstd ? codec::decompress_zstd : codec::inflate;
    const auto& geometry = core_->rules.geometry;
    auto result = read_compressed(*core_->file, mapped.compressed, decompress, geometry.cluster_size(),
                                  geometry.offset_in_cluster(at.value), to);
    if (result) return {};
    auto error = std::move(result).error().in(fmt::format("guest offset {:#x}", at.value));
    // The stream's last sector may reach past the end of a file that was not cut.
    const HostOffset end = mapped.compressed.offset + mapped.compressed.length;
    if (error.code == Errc::corrupt && end.value > TRY(core_->file->size()))
        error.what = past_the_end(*core_, *core_->file, "the end of its compressed data", end);
    return unreadable(std::move(error), at, to.size());
}

Result<Extent> View::extent(GuestOffset at, std::uint64_t limit) const {
    auto extent = TRY(own_extent(at, limit));
    if (extent.kind == Extent::Kind::unallocated) return core_->below.extent(at, extent.length);
    return extent;
}

Result<Extent> View::own_extent(GuestOffset at, std::uint64_t limit) const {
    const auto mapped = TRY(lookup(at, limit));
    Extent extent;
    extent.start = at;
    extent.length = mapped.length;
    if (mapped.kind == ClusterKind::unallocated) return extent;
    const bool stored = mapped.kind == ClusterKind::data || mapped.kind == ClusterKind::compressed;
    extent.kind = stored ? Extent::Kind::data : Extent::Kind::zero;
    extent.compressed = mapped.kind == ClusterKind::compressed;
    const bool has_place = mapped.kind == ClusterKind::data || mapped.kind == ClusterKind::zero_allocated;
    if (has_place && core_->header.crypt == format::Crypt::none && core_->data) {
        extent.host = mapped.host;
        extent.storage = core_->data.get();
    }
    return extent;
}

}  // namespace qcow::qcow2
