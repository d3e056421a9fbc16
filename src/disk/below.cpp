#include "disk/below.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/try.h"

namespace qcow {
std::unexpected<Error> Below::not_opened(GuestOffset at) const {
    return fail(Errc::not_found, fmt::format("guest offset {:#x}", at.value),
                fmt::format("it lies in the backing file \"{}\", which was not opened", backing_name_));
}

Result<void> Below::read(GuestOffset at, std::span<std::byte> to) const {
    std::size_t there = 0;
    if (image_) {
        there = at.value >= image_->size() ? 0 : std::min<std::uint64_t>(to.size(), image_->size() - at.value);
        if (there != 0) TRY_VOID(image_->read(at, to.first(there)));
    } else if (!backing_name_.empty()) {
        return not_opened(at);
    }
    std::memset(to.data() + there, 0, to.size() - there);
    return {};
}

Result<Extent> Below::extent(GuestOffset at, std::uint64_t limit) const {
    if (!image_ && !backing_name_.empty()) return not_opened(at);
    if (!image_ || at.value >= image_->size())
        return Extent{.start = at, .length = limit, .kind = Extent::Kind::unallocated};
    Extent extent = TRY(image_->extent(at, std::min(limit, image_->size() - at.value)));
    ++extent.depth;
    return extent;
}

}  // namespace qcow
