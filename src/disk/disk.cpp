#include "qcow/disk.h"

#include <algorithm>
#include <optional>

#include "base/within_memory.h"
#include "disk/range.h"
#include "storage/redo_log.h"

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

Result<void> Disk::read(GuestOffset at, Buffers to) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(verify_range(*this, at, to.size()));
        return do_read(at, to);
    });
}

Result<Extent> Disk::extent(GuestOffset at, std::uint64_t limit) {
    return within_memory([&]() -> Result<Extent> {
        TRY_VOID(verify_range(*this, at, 1));
        return do_extent(at, std::min(limit, size() - at.value));
    });
}

template <class Work>
auto Disk::change(GuestOffset at, std::uint64_t length, Work&& work) -> decltype(work()) {
    return within_memory([&]() -> decltype(work()) {
        TRY_VOID(verify_writable());
        TRY_VOID(verify_range(*this, at, length));
        return work();
    });
}

Result<void> Disk::write(GuestOffset at, ConstBuffers from) {
    return change(at, from.size(), [&] { return do_write(at, from); });
}

Result<void> Disk::write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes) {
    return change(at, length, [&] { return do_write_zeroes(at, length, zeroes); });
}

Result<void> Disk::discard(GuestOffset at, std::uint64_t length) {
    return change(at, length, [&] { return do_discard(at, length); });
}

Result<std::uint64_t> Disk::copy_from(GuestOffset at, const Storage& source, HostOffset from, std::uint64_t length) {
    return change(at, length, [&] { return do_copy_from(at, source, from, length); });
}

Result<void> Disk::flush() {
    return within_memory([&] { return do_flush(); });
}

Result<void> Disk::survive_in(SurvivingMemory memory) {
    return within_memory([&]() -> Result<void> {
        if (memory.bytes.size() < RedoLog::min_bytes) {
            return fail(Errc::invalid_argument, "",
                        fmt::format("{} bytes of surviving memory are too few; it takes {} at least",
                                    memory.bytes.size(), RedoLog::min_bytes));
        }
        return do_survive_in(std::move(memory));
    });
}

Result<void> Disk::verify_writable() const { return read_only(); }
Result<void> Disk::do_write(GuestOffset, ConstBuffers) { return read_only(); }
Result<void> Disk::do_write_zeroes(GuestOffset, std::uint64_t, Zeroes) { return read_only(); }
Result<void> Disk::do_discard(GuestOffset, std::uint64_t) { return read_only(); }
Result<std::uint64_t> Disk::do_copy_from(GuestOffset, const Storage&, HostOffset, std::uint64_t) { return 0; }
Result<void> Disk::do_flush() { return {}; }
// NOLINTNEXTLINE(performance-unnecessary-value-param): those that keep it move it
Result<void> Disk::do_survive_in(SurvivingMemory) { return {}; }

Result<void> verify_range(const Disk& disk, GuestOffset at, std::uint64_t length) {
    if (lies_within(at.value, length, disk.size())) return {};
    return fail(Errc::invalid_argument, "",
                fmt::format("{} bytes at guest offset {:#x} reach past the end of the disk ({} bytes)", length,
                            at.value, disk.size()));
}

std::unexpected<Error> no_key(const std::string& file) {
    return fail(Errc::encrypted, file,
                "the image is encrypted, and its key was not given (--key FILE); its metadata can be examined");
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
    return within_memory([&]() -> Result<void> {
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
    });
}

}  // namespace qcow
