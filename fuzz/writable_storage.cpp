#include "fuzz/writable_storage.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/buffers.h"

namespace qcow::fuzz {

WritableStorage::WritableStorage(const SparseFile& file, std::string name)
    : size_(file.size()), max_size_(size_ + max_growth), name_(std::move(name)) {
    for (const auto& segment : file.segments) {
        if (segment.offset >= size_) continue;
        store(segment.offset,
              std::span(segment.bytes).first(std::min<std::uint64_t>(segment.bytes.size(), size_ - segment.offset)));
    }
}

std::shared_ptr<WritableStorage> WritableStorage::copy() const {
    auto result = std::make_shared<WritableStorage>(SparseFile{}, name_);
    result->pages_ = pages_;
    result->size_ = size_;
    result->max_size_ = max_size_;
    return result;
}

std::string WritableStorage::identity() const { return fmt::format("writable:{}", static_cast<const void*>(this)); }

Result<std::size_t> WritableStorage::read(HostOffset at, Buffers to) const {
    fill_zeros(to);
    if (at.value >= size_) return 0;
    const std::uint64_t end = at.value + std::min<std::uint64_t>(to.size(), size_ - at.value);
    for (auto page = pages_.lower_bound(at.value / page_bytes); page != pages_.end() && page->first * page_bytes < end;
         ++page) {
        const std::uint64_t begin = page->first * page_bytes;
        const std::uint64_t first = std::max(at.value, begin);
        const auto bytes = std::span(page->second).subspan(first - begin, std::min(end, begin + page_bytes) - first);
        scatter(bytes, to.subspan(first - at.value));
    }
    return end - at.value;
}

Result<void> WritableStorage::write(HostOffset at, ConstBuffers pieces) {
    if (pieces.empty()) return {};
    const auto from = gathered(pieces);
    if (watcher_.write) watcher_.write(at, from);
    const std::uint64_t most = divide_up(from.size(), page_bytes) + 1;
    if (at.value > max_size_ || from.size() > max_size_ - at.value ||
        (pages_.size() + most) * page_bytes > max_stored_bytes)
        return no_space();
    size_ = std::max(size_, at.value + from.size());
    store(at.value, from);
    return {};
}

Result<void> WritableStorage::write_zeroes(HostOffset at, std::uint64_t length) {
    if (at.value >= size_) return {};
    length = std::min(length, size_ - at.value);
    if (watcher_.lose) watcher_.lose(at, length);
    drop(at.value, at.value + length);
    return {};
}

Result<void> WritableStorage::resize(std::uint64_t size) {
    if (size > max_size_) return no_space();
    if (size < size_) {
        if (watcher_.lose) watcher_.lose({size}, size_ - size);
        drop(size, size_);
    }
    size_ = size;
    return {};
}

Result<Storage::Run> WritableStorage::run(HostOffset at, std::uint64_t limit) const {
    if (at.value >= size_) return Run{false, limit};
    const std::uint64_t end = at.value + std::min(size_ - at.value, limit);
    const auto page = pages_.lower_bound(at.value / page_bytes);
    if (page == pages_.end()) return Run{false, end - at.value};
    const std::uint64_t begin = page->first * page_bytes;
    if (begin > at.value) return Run{false, std::min(end, begin) - at.value};
    return Run{true, std::min(end, begin + page_bytes) - at.value};
}

void WritableStorage::store(std::uint64_t at, std::span<const std::byte> from) {
    while (!from.empty()) {
        const std::uint64_t within = at % page_bytes;
        const auto part = from.first(std::min<std::uint64_t>(from.size(), page_bytes - within));
        const auto there = pages_.find(at / page_bytes);
        if (there != pages_.end()) {
            std::memcpy(there->second.data() + within, part.data(), part.size());
        } else if (!is_zero(part)) {
            std::memcpy(pages_[at / page_bytes].data() + within, part.data(), part.size());
        }
        at += part.size();
        from = from.subspan(part.size());
    }
}

void WritableStorage::drop(std::uint64_t at, std::uint64_t end) {
    for (auto page = pages_.lower_bound(at / page_bytes); page != pages_.end() && page->first * page_bytes < end;) {
        const std::uint64_t begin = page->first * page_bytes;
        const std::uint64_t first = std::max(at, begin);
        const std::uint64_t last = std::min(end, begin + page_bytes);
        if (last - first == page_bytes) {
            page = pages_.erase(page);
        } else {
            std::memset(page->second.data() + (first - begin), 0, last - first);
            ++page;
        }
    }
}

std::unexpected<Error> WritableStorage::no_space() {
    refused_ = true;
    return std::unexpected(Error{Errc::no_space, name_, "there is no room left"});
}

}  // namespace qcow::fuzz
