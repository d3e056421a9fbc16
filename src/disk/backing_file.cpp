#include "disk/backing_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "base/buffers.h"
#include "base/try.h"

namespace qcow {

/// The destructor of a layer runs that of its BackingFile, and so on. So that these do not nest as deeply as the chain
/// is long, the innermost leaves its layer to the outermost.
BackingFile::~BackingFile() {
    static thread_local std::shared_ptr<Layer>* next = nullptr;
    if (next != nullptr && *next == nullptr) {
        *next = std::move(image_);
        return;
    }
    std::shared_ptr<Layer> left;
    auto* const outer = std::exchange(next, &left);
    while (image_) {
        image_.reset();
        image_ = std::move(left);
    }
    next = outer;
}

std::unexpected<Error> BackingFile::not_opened(GuestOffset at) const {
    return fail(Errc::not_found, fmt::format("guest offset {:#x}", at.value),
                fmt::format("it lies in the backing file \"{}\", which was not opened", backing_name_));
}

/// The front of `to`, from the next layer alone.
Result<Layer::Part> BackingFile::read_part(GuestOffset at, Buffers to) const {
    if (!image_ && !backing_name_.empty()) return not_opened(at);
    if (!image_ || at.value >= image_->size()) {
        fill_zeros(to);
        return Layer::Part{to.size()};
    }
    return image_->read_part(at, to.first(std::min<std::uint64_t>(to.size(), image_->size() - at.value)));
}

Result<void> BackingFile::read(GuestOffset at, Buffers to) const {
    struct Request {
        const BackingFile* backing = nullptr;
        GuestOffset at;
        Buffers to;
    };
    std::vector<Request> waiting;  // what remains of requests to layers further up
    for (Request now{this, at, to};;) {
        if (now.to.empty()) {
            if (waiting.empty()) return {};
            now = waiting.back();
            waiting.pop_back();
            continue;
        }
        const auto part = TRY(now.backing->read_part(now.at, now.to));
        const Request rest{now.backing, now.at + part.length, now.to.subspan(part.length)};
        if (part.held) {
            now = rest;
        } else {
            if (!rest.to.empty()) waiting.push_back(rest);
            now = {now.backing->image_->backing_file(), now.at, now.to.first(part.length)};
        }
    }
}

Result<Extent> BackingFile::extent(GuestOffset at, std::uint64_t limit) const {
    const BackingFile* backing = this;
    for (unsigned depth = 0;; ++depth) {
        const auto& image = backing->image_;
        if (!image && !backing->backing_name_.empty()) return backing->not_opened(at);
        if (!image || at.value >= image->size())
            return Extent{.start = at, .length = limit, .kind = Extent::Kind::unallocated, .depth = depth};
        Extent extent = TRY(image->own_extent(at, std::min(limit, image->size() - at.value)));
        if (extent.kind != Extent::Kind::unallocated) {
            extent.depth = depth + 1;
            return extent;
        }
        limit = extent.length;
        backing = image->backing_file();
    }
}

Result<void> BackingFile::verify_readable() const {
    for (const auto* backing = this; backing != nullptr && backing->image_; backing = backing->image_->backing_file())
        TRY_VOID(backing->image_->verify_readable());
    return {};
}

}  // namespace qcow
