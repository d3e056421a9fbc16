#include "operation/salvage.h"

#include <algorithm>
#include <iterator>

#include "base/bits.h"
#include "disk/range.h"
#include "qcow/image.h"

namespace qcow {
namespace {

/// Where the error says it, what of the request cannot be read.
std::optional<GuestRange> unreadable_part(const Error& error, GuestOffset at, std::uint64_t length) {
    const auto& range = error.unreadable;
    const GuestOffset begin = std::max(range.start, at);
    const GuestOffset end = std::min(range.start + range.length, at + length);
    if (begin >= end) return std::nullopt;
    return GuestRange{begin, end - begin};
}

/// Of a request that spans sectors, what to try first.
std::uint64_t first_half(GuestOffset at, std::uint64_t length) {
    const std::uint64_t middle = align_down(at.value + length / 2, sector_bytes);
    return middle > at.value ? middle - at.value : sector_bytes - at.value % sector_bytes;
}

}  // namespace

Result<void> Salvager::read(GuestOffset at, std::span<std::byte> to) {
    while (!to.empty()) {
        const auto done = source_.read(at, to);
        if (done) return {};
        if (!is_loss(done.error())) return done;
        auto lost = unreadable_part(done.error(), at, to.size());
        const bool one_sector = at.value / sector_bytes == (at.value + to.size() - 1) / sector_bytes;
        if (!lost && one_sector) lost = {at, to.size()};
        // What lies before it is read again: a read that fails leaves nothing that could be relied upon.
        const std::uint64_t before = lost ? lost->start - at : first_half(at, to.size());
        if (before != 0) TRY_VOID(read(at, to.first(before)));
        const std::uint64_t given_up = lost ? TRY(give_up(*lost, to.subspan(before, lost->length), done.error())) : 0;
        at += before + given_up;
        to = to.subspan(before + given_up);
    }
    return {};
}

/// Gives how many bytes from the front are dealt with.
Result<std::uint64_t> Salvager::give_up(const GuestRange& lost, std::span<std::byte> to, Error why) {
    GuestRange range = lost;
    if (why.code == Errc::io) {
        // What fails for a moment is not lost.
        auto again = source_.read(range.start, to);
        if (again) return to.size();
        if (!is_loss(again.error())) return std::unexpected(std::move(again).error());
        why = std::move(again).error();
        // Perhaps less of it.
        if (const auto part = unreadable_part(why, range.start, range.length)) {
            if (const std::uint64_t before = part->start - range.start; before != 0) {
                TRY_VOID(read(range.start, to.first(before)));
                return before;
            }
            range = *part;
        }
    }
    std::ranges::fill(to.first(range.length), std::byte{0});
    lose(range, why);
    return range.length;
}

void Salvager::lose(const GuestRange& bytes, const Error& why) {
    const std::lock_guard lock(mutex_);
    bytes_ += bytes.length;
    Lost lost{bytes.length, why};
    const auto next = ranges_.find(bytes.start.value + bytes.length);
    if (next != ranges_.end() && next->second.why.code == why.code) {
        lost.length += next->second.length;
        ranges_.erase(next);
    }
    auto previous = ranges_.lower_bound(bytes.start.value);
    if (previous != ranges_.begin()) {
        --previous;
        auto& range = previous->second;
        if (previous->first + range.length == bytes.start.value && range.why.code == why.code) {
            range.length += lost.length;
            return;
        }
    }
    if (ranges_.size() < Losses::max_ranges) {
        ranges_.emplace(bytes.start.value, std::move(lost));
    } else {
        unlisted_bytes_ += lost.length;
    }
}

Losses Salvager::losses() const {
    const std::lock_guard lock(mutex_);
    Losses losses;
    losses.bytes = bytes_;
    losses.unlisted_bytes = unlisted_bytes_;
    for (const auto& [start, lost] : ranges_) losses.ranges.push_back({{{start}, lost.length}, lost.why});
    return losses;
}

}  // namespace qcow
