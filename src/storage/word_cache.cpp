#include "storage/word_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstdlib>
#include <new>

#include "base/bits.h"
#include "base/endian.h"
#include "base/try.h"

namespace qcow {
namespace {

constexpr std::size_t max_page_bytes = 4096;
constexpr std::uint64_t max_offset = bit(56);  // so that page number and version fit in a tag
constexpr std::size_t max_sets = std::size_t{1} << 20;

}  // namespace

void WordCache::Free::operator()(void* memory) const { std::free(memory); }

WordCache::WordCache(std::shared_ptr<const Storage> storage, std::size_t page_bytes, std::size_t budget_bytes)
    : storage_(std::move(storage)),
      page_words_(page_bytes / 8),
      set_count_(std::bit_floor(std::clamp<std::size_t>(budget_bytes / (page_bytes * ways), 1, max_sets))),
      sets_(std::make_unique<Set[]>(set_count_)),
      locks_(std::make_unique<SetLock[]>(set_count_)) {
    assert(std::has_single_bit(page_bytes) && page_bytes >= 512 && page_bytes <= max_page_bytes);
    // calloc, because it takes pages of memory only as they are touched. Zeroed memory is a valid array of atomics.
    static_assert(std::atomic<std::uint64_t>::is_always_lock_free && sizeof(std::atomic<std::uint64_t>) == 8);
    void* memory = std::calloc(set_count_ * ways * page_words_, 8);
    if (memory == nullptr) throw std::bad_alloc();
    words_.reset(static_cast<std::atomic<std::uint64_t>*>(memory));
}

std::size_t WordCache::set_of(std::uint64_t page) const {
    // Fibonacci hashing: tables lie at regular distances, which a plain mask would map to few sets.
    return static_cast<std::size_t>(page * 0x9e3779b97f4a7c15 >> 40) & (set_count_ - 1);
}

bool WordCache::load_cached(std::uint64_t page, std::size_t first, std::span<std::uint64_t> to) const {
    const std::size_t set = set_of(page);
    for (std::size_t way = 0; way < ways; ++way) {
        const auto& slot = sets_[set].tags[way];
        const std::uint64_t tag = slot.load(std::memory_order_acquire);
        if (tag >> version_bits != page + 1) continue;
        const auto* words = words_of(set, way) + first;
        // Acquire, so that the second look at the tag comes after the words.
        for (std::size_t i = 0; i < to.size(); ++i) to[i] = words[i].load(std::memory_order_acquire);
        return slot.load(std::memory_order_relaxed) == tag;
    }
    return false;
}

Result<void> WordCache::fill(std::uint64_t page) {
    const std::size_t set = set_of(page);
    auto& tags = sets_[set].tags;
    auto& lock = locks_[set];
    const std::lock_guard guard(lock.mutex);
    const auto holds = [&](const auto& tag) { return tag.load(std::memory_order_relaxed) >> version_bits == page + 1; };
    if (std::ranges::any_of(tags, holds)) return {};  // another thread has been faster

    std::array<std::byte, max_page_bytes> buffer;
    const auto bytes = std::span(buffer).first(page_words_ * 8);
    const HostOffset at{page * bytes.size()};
    TRY(storage_->read(at, bytes));

    const std::size_t way = lock.next_victim++ % ways;
    auto& slot = tags[way];
    const std::uint64_t version = (slot.load(std::memory_order_relaxed) + 1) & low_bits(version_bits);
    slot.store(version, std::memory_order_relaxed);
    auto* words = words_of(set, way);
    // Release, so that whoever sees a new word also sees that the page is being replaced.
    for (std::size_t i = 0; i < page_words_; ++i)
        words[i].store(load_be<std::uint64_t>(bytes, i * 8), std::memory_order_release);
    slot.store((page + 1) << version_bits | version, std::memory_order_release);
    return {};
}

Result<std::size_t> WordCache::load(HostOffset at, std::span<std::uint64_t> to) {
    assert(at.value % 8 == 0 && at.value < max_offset && !to.empty());
    const std::uint64_t page = at.value / 8 / page_words_;
    const std::size_t first = at.value / 8 % page_words_;
    to = to.first(std::min(to.size(), page_words_ - first));
    while (!load_cached(page, first, to)) TRY_VOID(fill(page));
    return to.size();
}

}  // namespace qcow
