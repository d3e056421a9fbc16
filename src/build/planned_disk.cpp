#include "build/planned_disk.h"

#include <algorithm>
#include <cstring>

#include "base/bits.h"
#include "base/buffers.h"

namespace qcow {

void PlannedDisk::place(GuestOffset at, std::uint64_t length, const Contents& content, std::uint64_t from) {
    if (length != 0) placed_.push_back({at.value, length, &content, from});
}

void PlannedDisk::seal() {
    std::ranges::sort(placed_, {}, &Placed::at);
    sealed_ = true;
}

/// The first place whose end is behind `at`.
std::size_t PlannedDisk::first_placed_behind(std::uint64_t at) const {
    const auto next = std::ranges::upper_bound(placed_, at, {}, &Placed::at);
    auto index = static_cast<std::size_t>(next - placed_.begin());
    if (index > 0 && placed_[index - 1].at + placed_[index - 1].length > at) --index;
    return index;
}

Result<void> PlannedDisk::do_read(GuestOffset at, Buffers to) {
    std::uint64_t position = at.value;
    for (const auto piece : to) {
        TRY_VOID(read_flat(position, piece));
        position += piece.size();
    }
    return {};
}

Result<void> PlannedDisk::read_flat(std::uint64_t at, std::span<std::byte> to) const {
    std::uint64_t done = 0;
    const auto zeros_until = [&](std::uint64_t end) {
        std::memset(to.data() + done, 0, end - done);
        done = end;
    };
    for (auto i = sealed_ ? first_placed_behind(at) : placed_.size(); i < placed_.size(); ++i) {
        const auto& placed = placed_[i];
        if (placed.at >= at + to.size()) break;
        const auto begin = std::max(placed.at, at);
        const auto end = std::min(placed.at + placed.length, at + to.size());
        zeros_until(begin - at);
        TRY_VOID(placed.content->read(placed.from + (begin - placed.at), to.subspan(begin - at, end - begin)));
        done = end - at;
    }
    zeros_until(to.size());
    return read_pages(at, to);
}

/// Puts what was written over what is in `to`.
Result<void> PlannedDisk::read_pages(std::uint64_t at, std::span<std::byte> to) const {
    const auto end = at + to.size();
    std::array<std::byte, page_bytes> from_file;
    for (auto page = pages_.lower_bound(at / page_bytes); page != pages_.end() && page->first * page_bytes < end;
         ++page) {
        const auto start = page->first * page_bytes;
        const auto* bytes = page->second.bytes.get();
        if (bytes == nullptr) {
            TRY_VOID(scratch_.read(page->second.in_scratch, from_file));
            bytes = &from_file;
        }
        for (unsigned i = 0; i < page_sectors; ++i) {
            const auto begin = std::max(start + i * sector, at);
            const auto last = std::min(start + (i + 1) * sector, end);
            if (page->second.written[i] && begin < last)
                std::memcpy(to.data() + (begin - at), bytes->data() + (begin - start), last - begin);
        }
    }
    return {};
}

Result<Extent> PlannedDisk::do_extent(GuestOffset at, std::uint64_t limit) {
    const auto begin = align_down(at.value, page_bytes);
    const auto most = at.value + limit;
    auto page = pages_.lower_bound(begin / page_bytes);
    auto next = sealed_ ? first_placed_behind(begin) : placed_.size();
    // Pages that hold anything are data.
    auto end = begin;
    while (end < most) {
        if (page != pages_.end() && page->first * page_bytes < end + page_bytes) {
            end = std::max(end, (page->first + 1) * page_bytes);
            ++page;
        } else if (next < placed_.size() && placed_[next].at < end + page_bytes) {
            end = std::max(end, divide_up(placed_[next].at + placed_[next].length, page_bytes) * page_bytes);
            ++next;
        } else {
            break;
        }
    }
    Extent extent{.start = at, .kind = Extent::Kind::data};
    if (end <= at.value) {
        extent.kind = Extent::Kind::unallocated;
        end = most;
        if (page != pages_.end()) end = std::min(end, page->first * page_bytes);
        if (next < placed_.size()) end = std::min(end, align_down(placed_[next].at, page_bytes));
    }
    extent.length = std::min(end, most) - at.value;
    return extent;
}

Result<void> PlannedDisk::do_write(GuestOffset at, ConstBuffers from) {
    std::uint64_t position = at.value;
    for (auto piece : from) {
        while (!piece.empty()) {
            const auto inside = position % page_bytes;
            const auto length = std::min<std::uint64_t>(piece.size(), page_bytes - inside);
            TRY_VOID(write_page(position / page_bytes, inside, piece.first(length)));
            piece = piece.subspan(length);
            position += length;
        }
    }
    return {};
}

Result<void> PlannedDisk::write_page(std::uint64_t number, std::size_t inside, std::span<const std::byte> from) {
    auto found = pages_.find(number);
    if (found == pages_.end()) {
        if (is_zero(from)) return {};
        found = pages_.try_emplace(number).first;
        if (pages_in_memory_ < most_pages_) {
            found->second.bytes = std::make_unique<std::array<std::byte, page_bytes>>();
            ++pages_in_memory_;
        } else {
            found->second.in_scratch = scratch_end_;
            scratch_end_ += page_bytes;
        }
    }
    auto& page = found->second;
    for (auto i = inside / sector; i * sector < inside + from.size(); ++i) page.written.set(i);
    if (!page.bytes) return scratch_.write(page.in_scratch + inside, from);
    std::memcpy(page.bytes->data() + inside, from.data(), from.size());
    return {};
}

Result<void> PlannedDisk::do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes) {
    // Where nothing was written, there are zeros already.
    constexpr std::array<std::byte, page_bytes> zeros = {};
    const auto end = at.value + length;
    for (auto page = pages_.lower_bound(at.value / page_bytes); page != pages_.end(); ++page) {
        const auto begin = std::max(at.value, page->first * page_bytes);
        const auto last = std::min(end, (page->first + 1) * page_bytes);
        if (begin >= last) break;
        TRY_VOID(write_page(page->first, begin % page_bytes, std::span(zeros).first(last - begin)));
    }
    return {};
}

Result<void> PlannedDisk::do_discard(GuestOffset at, std::uint64_t length) {
    return do_write_zeroes(at, length, Zeroes::release);
}

}  // namespace qcow
