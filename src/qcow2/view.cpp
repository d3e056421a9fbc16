#include "qcow2/view.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/buffers.h"
#include "base/try.h"
#include "codec/codec.h"
#include "disk/compressed.h"
#include "disk/range.h"

namespace qcow::qcow2 {

using format::ClusterKind;

Result<void> View::verify_readable() const {
    const auto& metadata = parts_->metadata;
    if (!parts_->data.is_unlocked()) return no_key(metadata.file().name());
    if (!parts_->data.is_open()) {
        return fail(Errc::not_found, metadata.file().name(),
                    "its data lie in an external data file, which was not opened");
    }
    return {};
}

Result<Mapped> View::lookup(GuestOffset at, std::uint64_t limit) const {
    auto mapped = mapping_.lookup(at, limit);
    if (!mapped && mapped.error().code == Errc::corrupt && on_damage_) return on_damage_(std::move(mapped).error());
    return mapped;
}

Result<void> View::read(GuestOffset at, Buffers to) const {
    TRY_VOID(verify_readable());
    if (to.empty()) return parts_->backing.verify_readable();
    while (!to.empty()) {
        const auto part = TRY(read_part(at, to));
        if (!part.held) TRY_VOID(parts_->backing.read(at, to.first(part.length)));
        at += part.length;
        to = to.subspan(part.length);
    }
    return {};
}

Result<Layer::Part> View::read_part(GuestOffset at, Buffers to) const {
    TRY_VOID(verify_readable());
    const auto mapped = TRY(lookup(at, to.size()));
    if (mapped.kind == ClusterKind::unallocated) return Layer::Part{mapped.length, false};
    std::uint64_t length = mapped.length;
    if (mapped.kind == ClusterKind::compressed) {
        const auto& geometry = parts_->metadata.geometry();
        length = std::min(length, geometry.cluster_size() - geometry.offset_in_cluster(at.value));
    }
    TRY_VOID(read_mapped(mapped, at, to.first(length)));
    return Layer::Part{length};
}

Result<void> View::read_mapped(const Mapped& mapped, GuestOffset at, Buffers to) const {
    switch (mapped.kind) {
        case ClusterKind::data: return parts_->data.read(mapped.host, at, to);
        case ClusterKind::compressed: return read_one_compressed(mapped, at, to);
        case ClusterKind::unallocated: return parts_->backing.read(at, to);
        case ClusterKind::zero:
        case ClusterKind::zero_allocated: fill_zeros(to);
    }
    return {};
}

Result<void> View::read_one_compressed(const Mapped& mapped, GuestOffset at, Buffers to) const {
    const auto& metadata = parts_->metadata;
    const auto decompress =
        metadata.header().compression == Compression::zstd ? codec::decompress_zstd : codec::inflate;
    const auto& geometry = metadata.geometry();
    auto result = read_compressed(metadata.file(), mapped.compressed, decompress, geometry.cluster_size(),
                                  geometry.offset_in_cluster(at.value), to);
    if (result) return {};
    auto error = std::move(result).error().in(fmt::format("guest offset {:#x}", at.value));
    // The stream's last sector may reach past the end of a file that was not cut.
    const HostOffset end = mapped.compressed.offset + mapped.compressed.length;
    if (error.code == Errc::corrupt && end.value > TRY(metadata.file().size()))
        error.what = metadata.past_the_end(metadata.file(), "the end of its compressed data", end);
    return unreadable(std::move(error), at, to.size());
}

Result<Extent> View::extent(GuestOffset at, std::uint64_t limit) const {
    auto extent = TRY(own_extent(at, limit));
    if (extent.kind == Extent::Kind::unallocated) return parts_->backing.extent(at, extent.length);
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
    if (has_place && !parts_->data.is_encrypted()) {
        extent.storage = parts_->data.storage();
        if (extent.storage != nullptr) extent.host = mapped.host;
    }
    return extent;
}

}  // namespace qcow::qcow2
