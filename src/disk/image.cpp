#include "qcow/image.h"

#include <fmt/format.h>

#include "base/try.h"
#include "base/within_memory.h"
#include "disk/range.h"

namespace qcow {

Result<ImageInfo> Image::info() const {
    return within_memory([&] { return do_info(); });
}

Result<void> Image::each_dirty(std::string_view bitmap, GuestOffset begin, std::uint64_t length,
                               const std::function<Result<void>(const DirtyRun&)>& visit) {
    return within_memory([&] { return do_each_dirty(bitmap, begin, length, visit); });
}

Result<CheckReport> Image::check(const CheckOptions& options) {
    return within_memory([&] { return do_check(options); });
}

Result<void> Image::write_compressed(GuestOffset at, std::span<const std::byte> from, std::optional<int> level) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(verify_writable());
        TRY_VOID(verify_range(*this, at, from.size()));
        return do_write_compressed(at, from, level);
    });
}

Result<void> Image::resize(std::uint64_t size, Shrink shrink) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(verify_writable());
        size = rounded_size(size);
        if (size < this->size() && shrink == Shrink::refuse) return refuse_to_shrink(*this, size);
        return size == this->size() ? Result<void>() : do_resize(size);
    });
}

Result<void> Image::change_backing(const std::string& name, std::optional<Format> format) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(verify_writable());
        return do_change_backing(name, format);
    });
}

Result<void> Image::change_bitmaps(std::span<const BitmapAction> actions) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(verify_writable());
        return do_change_bitmaps(actions);
    });
}

Result<void> Image::make_empty() {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(verify_writable());
        return do_make_empty();
    });
}

Result<void> Image::close() {
    return within_memory([&] { return do_close(); });
}

namespace {

/// The answer of an image whose format has no such thing.
std::unexpected<Error> has_no(const Image& image, std::string_view what, Errc code = Errc::unsupported) {
    const auto files = image.files();
    return fail(code, files.empty() ? "" : files.front(),
                fmt::format("a {} image has no {}", format_name(image.format()), what));
}

}  // namespace

Result<std::vector<SnapshotInfo>> Image::do_list_snapshots() const { return std::vector<SnapshotInfo>(); }

Result<std::shared_ptr<Disk>> Image::do_open_snapshot(std::string_view) {
    return has_no(*this, "internal snapshots", Errc::not_found);
}

Result<SnapshotInfo> Image::do_create_snapshot(const std::string&) { return has_no(*this, "internal snapshots"); }

Result<void> Image::do_apply_snapshot(std::string_view) { return has_no(*this, "internal snapshots", Errc::not_found); }

Result<void> Image::do_remove_snapshot(std::string_view) {
    return has_no(*this, "internal snapshots", Errc::not_found);
}

Result<void> Image::do_rename_snapshot(std::string_view, const std::string&) {
    return has_no(*this, "internal snapshots", Errc::not_found);
}

Result<void> Image::do_each_dirty(std::string_view, GuestOffset, std::uint64_t,
                                  const std::function<Result<void>(const DirtyRun&)>&) {
    return has_no(*this, "bitmaps", Errc::not_found);
}

Result<CheckReport> Image::do_check(const CheckOptions&) { return has_no(*this, "metadata that could be checked"); }

Result<void> Image::do_write_compressed(GuestOffset, std::span<const std::byte>, std::optional<int>) {
    return has_no(*this, "compressed clusters");
}

Result<void> Image::do_resize(std::uint64_t) { return has_no(*this, "virtual size that could change"); }

Result<void> Image::do_change_backing(const std::string&, std::optional<Format>) {
    return has_no(*this, "backing file that could be changed");
}

Result<void> Image::do_change_bitmaps(std::span<const BitmapAction>) {
    return has_no(*this, "bitmaps; convert it to qcow2");
}

Result<void> Image::do_make_empty() { return has_no(*this, "backing file that could show through"); }

Result<void> Image::do_close() { return do_flush(); }

}  // namespace qcow
