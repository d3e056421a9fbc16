#include "operation/runs.h"

#include <algorithm>

#include "base/bits.h"
#include "base/try.h"
#include "qcow/storage.h"

namespace qcow {
namespace {

/// A request to stop a job waits for the lookups of so many bytes.
constexpr std::uint64_t longest_zeros = GiB;

/// A preallocated cluster may be a hole in its file.
Result<void> look_into_file(Run& run) {
    auto& extent = run.extent;
    const auto stored = TRY(extent.storage->run(*extent.host, extent.length));
    if (!stored.data && !TRY(lies_in_file(extent))) return {};
    extent.length = std::min(extent.length, stored.length);
    run.zeros = !stored.data;
    return {};
}

}  // namespace

Result<Run> Runs::at(GuestOffset at) {
    auto& extent = run_.extent;
    const std::uint64_t passed = at - extent.start;
    if (passed < extent.length) {
        extent.start = at;
        extent.length -= passed;
        if (extent.host) *extent.host += passed;
        return run_;
    }
    run_ = next_ && next_->extent.start == at ? *next_ : TRY(find(at));
    next_.reset();
    while (run_.zeros && extent.length < longest_zeros && extent.start.value + extent.length < disk_.size()) {
        auto next = find(extent.start + extent.length);
        if (!next) break;  // whoever asks for it gets the error
        if (!next->zeros || next->extent.kind != extent.kind ||
            next->extent.host.has_value() != extent.host.has_value()) {
            next_ = *next;
            break;
        }
        extent.length += next->extent.length;
    }
    return run_;
}

Result<Run> Runs::find(GuestOffset at) const {
    Run found{TRY(disk_.extent(at, disk_.size() - at.value))};
    found.zeros = found.extent.kind != Extent::Kind::data;
    if (!found.zeros && found.extent.host) TRY_VOID(look_into_file(found));
    return found;
}

Result<bool> lies_in_file(const Extent& extent) {
    return lies_within(extent.host->value, extent.length, TRY(extent.storage->size()));
}

}  // namespace qcow
