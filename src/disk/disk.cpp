#include "qcow/disk.h"

#include <algorithm>
#include <optional>

#include "base/try.h"
#include "disk/range.h"
#include "qcow/image.h"

namespace qcow {
namespace {

std::unexpected<Error> read_only() { return fail(Errc::read_only, "", "the disk was opened for reading only"); }

/// Whether `next` goes on where `extent` ends, in guest and host, and is of the same kind.
bool continues(const Extent& extent, const Extent& next) {
    if (extent.kind != next.kind || extent.compressed != next.compressed || extent.depth != next.depth) return false;
    if (extent.storage != next.storage || extent.host.has_value() != next.host.has_value()) return false;
    return !extent.host || *extent.host + extent.length == *next.host;
}

}  // namespace

Result<void> Disk::write(GuestOffset, std::span<const std::byte>) { return read_only(); }
Result<void> Disk::write_zeroes(GuestOffset, std::uint64_t, Zeroes) { return read_only(); }
Result<void> Disk::discard(GuestOffset, std::uint64_t) { return read_only(); }
Result<std::uint64_t> Disk::copy_from(GuestOffset, const Storage&, HostOffset, std::uint64_t) { return 0; }
Result<void> Disk::flush() { return {}; }

Result<std::shared_ptr<Disk>> Image::snapshot(std::string_view) {
    return fail(Errc::not_found, "", "the format has no internal snapshots");
}

Result<void> Image::each_dirty(std::string_view, GuestOffset, std::uint64_t,
                               const std::function<Result<void>(const DirtyRun&)>&) {
    return fail(Errc::not_found, "", "the format has no bitmaps");
}

Result<void> Image::write_compressed(GuestOffset, std::span<const std::byte>, std::optional<int>) {
    return fail(Errc::unsupported, "", "the format has no compressed clusters");
}

Result<void> Image::resize(std::uint64_t, Shrink) { return read_only(); }
Result<void> Image::close() { return flush(); }

Result<CheckReport> Image::check(const CheckOptions&) {
    return fail(Errc::unsupported, "", "the format has no metadata that could be checked");
}

Result<void> verify_range(const Disk& disk, GuestOffset at, std::uint64_t length) {
    if (lies_within(at.value, length, disk.size())) return {};
    return fail(Errc::invalid_argument, "",
                fmt::format("{} bytes at guest offset {:#x} reach past the end of the disk ({} bytes)", length,
                            at.value, disk.size()));
}

std::unexpected<Error> unreadable(Error error, GuestOffset at, std::uint64_t length) {
    if (error.unreadable.length == 0) error.unreadable = {at, length};
    return std::unexpected(std::move(error));
}

bool is_loss(const Error& error) { return error.code == Errc::corrupt || error.code == Errc::io; }

std::unexpected<Error> refuse_to_shrink(const Disk& disk, std::uint64_t size) {
    return fail(Errc::invalid_argument, "",
                fmt::format("{} bytes are fewer than the disk has ({}), and what lies past them would be lost; allow "
                            "shrinking if that is meant",
                            size, disk.size()));
}

Result<void> each_extent(Disk& disk, GuestOffset begin, std::uint64_t length,
                         const std::function<Result<void>(const Extent&)>& visit) {
    TRY_VOID(verify_range(disk, begin, length));
    const GuestOffset end = begin + length;
    std::optional<Extent> pending;
    for (GuestOffset at = begin; at < end;) {
        const Extent next = TRY(disk.extent(at, end - at));
        at += next.length;
        if (pending && continues(*pending, next)) {
            pending->length += next.length;
            continue;
        }
        if (pending) TRY_VOID(visit(*pending));
        pending = next;
    }
    return pending ? visit(*pending) : Result<void>();
}

}  // namespace qcow
