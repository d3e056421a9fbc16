#include "disk/below.h"

#include <algorithm>
#include <cstring>

#include "base/try.h"

namespace qcow {
namespace {

std::unexpected<Error> not_opened() {
    return fail(Errc::not_found, "", "these bytes lie in the backing file, which was not opened");
}

}  // namespace

Result<void> Below::read(GuestOffset at, std::span<std::byte> to) const {
    std::size_t there = 0;
    if (image_) {
        there = at.value >= image_->size() ? 0 : std::min<std::uint64_t>(to.size(), image_->size() - at.value);
        if (there != 0) TRY_VOID(image_->read(at, to.first(there)));
    } else if (named_) {
        return not_opened();
    }
    std::memset(to.data() + there, 0, to.size() - there);
    return {};
}

Result<Extent> Below::extent(GuestOffset at, std::uint64_t limit) const {
    if (!image_ && named_) return not_opened();
    if (!image_ || at.value >= image_->size())
        return Extent{.start = at, .length = limit, .kind = Extent::Kind::unallocated, .depth = image_ ? 1U : 0U};
    Extent extent = TRY(image_->extent(at, std::min(limit, image_->size() - at.value)));
    ++extent.depth;
    return extent;
}

}  // namespace qcow
