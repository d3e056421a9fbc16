#include "disk/flat_layer.h"

#include <fmt/format.h>

#include "base/try.h"
#include "disk/range.h"

namespace qcow {

std::unexpected<Error> FlatLayer::was_cut(GuestOffset at, std::uint64_t length) const {
    return unreadable({Errc::io, storage_->name(),
                       fmt::format("it ends before offset {:#x}, although it had {} bytes when it was opened",
                                   host(at).value, host({size_}).value)},
                      at, length);
}

Result<void> FlatLayer::do_read(GuestOffset at, Buffers to) {
    TRY_VOID(verify_readable());
    if (!to.empty()) TRY(read_part(at, to));
    return {};
}

Result<void> FlatLayer::do_resize(std::uint64_t size) {
    TRY_VOID(storage_->resize(host({size}).value));
    size_ = size;
    return {};
}

Result<void> FlatLayer::do_flush() {
    return write_options() && write_options()->cache != CacheMode::unsafe ? storage_->flush() : Result<void>();
}

Result<void> FlatLayer::do_close() {
    TRY_VOID(do_flush());
    write_with({});
    return {};
}

Result<ImageInfo> FlatLayer::do_info() const {
    ImageInfo info;
    info.filename = storage_->name();
    info.format = format();
    info.virtual_size = size_;
    info.file_size = TRY(storage_->size());
    info.disk_size = TRY(storage_->allocated());
    return info;
}

}  // namespace qcow
