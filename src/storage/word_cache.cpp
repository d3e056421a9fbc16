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
constexpr std::size_t sector_bytes = 512;  // what a disk may be unable to read
constexpr std::size_t max_page_words = max_page_bytes / 8;
constexpr std::size_t max_run_pages = 16;  // 64 KiB, the usual size of a table
constexpr std::uint64_t max_offset = bit(56);
constexpr std::size_t max_sets = std::size_t{1} << 20;

constexpr std::uint8_t bit_of(std::size_t way) { return static_cast<std::uint8_t>(1U << way); }

}  // namespace

/// The locks of the sets that the pages of a run go into. All who take several take them in the order of the sets.
class WordCache::SetLocks {
public:
    SetLocks(const WordCache& cache, PageRun run) {
        std::array<std::size_t, max_run_pages> sets;
        for (std::size_t i = 0; i < run.count; ++i) sets[i] = cache.set_of(run.first + i);
        const auto used = std::span(sets).first(run.count);
        std::ranges::sort(used);
        for (std::size_t i = 0; i < used.size(); ++i) {
            if (i == 0 || used[i] != used[i - 1]) locks_[i] = std::unique_lock(cache.states_[used[i]].mutex);
        }
    }

private:
    std::array<std::unique_lock<std::mutex>, max_run_pages> locks_;
};

void WordCache::Free::operator()(void* memory) const { std::free(memory); }

WordCache::WordCache(std::shared_ptr<Storage> storage, std::size_t page_bytes, std::size_t budget_bytes)
    : storage_(std::move(storage)),
      page_words_(page_bytes / 8),
      set_count_(std::bit_floor(std::clamp<std::size_t>(budget_bytes / (page_bytes * ways), 1, max_sets))),
      run_pages_(std::min(set_count_, max_run_pages)),
      sets_(std::make_unique<Set[]>(set_count_)),
      states_(std::make_unique<SetState[]>(set_count_)) {
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

/// Under the set's lock: the way that holds the page, or `ways`.
std::size_t WordCache::find(std::size_t set, std::uint64_t page) const {
    const auto& tags = sets_[set].tags;
    std::size_t way = 0;
    while (way < ways && tags[way].load(std::memory_order_relaxed) != page + 1) ++way;
    return way;
}

bool WordCache::load_cached(std::uint64_t page, std::size_t first, std::span<std::uint64_t> to) const {
    const std::size_t set = set_of(page);
    for (std::size_t way = 0; way < ways; ++way) {
        if (sets_[set].tags[way].load(std::memory_order_relaxed) != page + 1) continue;
        const auto& version = sets_[set].versions[way];
        const std::uint64_t before = version.load(std::memory_order_acquire);
        if (before % 2 != 0 || sets_[set].tags[way].load(std::memory_order_acquire) != page + 1) return false;
        const auto* words = words_of(set, way) + first;
        // Acquire, so that the second look at the version comes after the words.
        for (std::size_t i = 0; i < to.size(); ++i) to[i] = words[i].load(std::memory_order_acquire);
        return version.load(std::memory_order_relaxed) == before;
    }
    return false;
}

/// Under the set's lock: makes the way hold `tag`, with these words from the `first` on.
void WordCache::change(std::size_t set, std::size_t way, std::uint64_t tag, std::size_t first,
                       std::span<const std::uint64_t> words) {
    auto& version = sets_[set].versions[way];
    const std::uint64_t before = version.load(std::memory_order_relaxed);
    version.store(before + 1, std::memory_order_relaxed);
    // Release, so that whoever sees a new tag or word also sees that the page is being changed.
    sets_[set].tags[way].store(tag, std::memory_order_release);
    auto* to = words_of(set, way) + first;
    for (std::size_t i = 0; i < words.size(); ++i) to[i].store(words[i], std::memory_order_release);
    version.store(before + 2, std::memory_order_release);
}

Result<void> WordCache::read_pages(std::uint64_t first, std::span<std::uint64_t> to) const {
    TRY(storage_->read({first * page_bytes()}, std::as_writable_bytes(to)));
    for (auto& word : to) word = big_endian(word);
    return {};
}

/// Under the set's lock: the way whose page goes next, or `ways` where none can be replaced.
std::size_t WordCache::replaceable_way(std::size_t set) {
    auto& state = states_[set];
    for (std::size_t tried = 0; tried < ways; ++tried) {
        const std::size_t way = state.next_victim++ % ways;
        if (state.slots[way].replaceable()) return way;
    }
    return ways;
}

/// Under the locks of their sets: reads the pages that are missing, with one call. Where none can be replaced, a page
/// stays missing.
Result<void> WordCache::fill(PageRun run) {
    const auto missing = [&](std::uint64_t page) { return find(set_of(page), page) == ways; };
    while (run.count > 0 && !missing(run.end() - 1)) --run.count;
    for (; run.count > 0 && !missing(run.first); --run.count) ++run.first;
    if (run.count == 0) return {};
    std::array<std::uint64_t, max_run_pages * max_page_words> buffer;
    const auto words = std::span(buffer).first(run.count * page_words_);
    TRY_VOID(read_pages(run.first, words));
    // Backwards, so that no other page takes the place of the first.
    for (std::size_t i = run.count; i-- > 0;) {
        const std::uint64_t page = run.first + i;
        const std::size_t set = set_of(page);
        if (!missing(page)) continue;
        const std::size_t way = replaceable_way(set);
        if (way == ways) continue;
        change(set, way, page + 1, 0, words.subspan(i * page_words_, page_words_));
        states_[set].has_space &= static_cast<std::uint8_t>(~bit_of(way));
    }
    return {};
}

/// Under the locks of their sets.
Result<void> WordCache::reserve_space(PageRun run) {
    const auto has_space = [&](std::uint64_t page) {
        const std::size_t set = set_of(page);
        const std::size_t way = find(set, page);
        return way < ways && (states_[set].has_space & bit_of(way)) != 0;
    };
    while (run.count > 0 && has_space(run.end() - 1)) --run.count;
    for (; run.count > 0 && has_space(run.first); --run.count) ++run.first;
    if (run.count == 0) return {};
    TRY_VOID(storage_->allocate({run.first * page_bytes()}, run.count * page_bytes()));
    for (std::uint64_t page = run.first; page < run.end(); ++page) {
        const std::size_t set = set_of(page);
        if (const std::size_t way = find(set, page); way < ways) states_[set].has_space |= bit_of(way);
    }
    return {};
}

Result<void> WordCache::reserve_space(HostOffset at, std::uint64_t length) {
    const std::uint64_t end = divide_up(at.value + length, page_bytes());
    for (std::uint64_t page = at.value / page_bytes(); page < end; page += run_pages_) {
        const PageRun run{page, static_cast<std::size_t>(std::min<std::uint64_t>(run_pages_, end - page))};
        const SetLocks locks(*this, run);
        TRY_VOID(fill(run));
        TRY_VOID(reserve_space(run));
    }
    return {};
}

/// Past the cache, of a page that cannot be read as a whole.
Result<std::size_t> WordCache::load_sector(HostOffset at, std::span<std::uint64_t> to) const {
    std::array<std::byte, sector_bytes> sector;
    const std::size_t inside = at.value % sector.size();
    TRY(storage_->read({at.value - inside}, sector));
    to = to.first(std::min(to.size(), (sector.size() - inside) / 8));
    for (std::size_t i = 0; i < to.size(); ++i) to[i] = load_be<std::uint64_t>(sector, inside + i * 8);
    return to.size();
}

Result<std::size_t> WordCache::load(HostOffset at, std::span<std::uint64_t> to) {
    assert(at.value % 8 == 0 && at.value < max_offset && !to.empty());
    const std::uint64_t page = at.value / 8 / page_words_;
    const std::size_t first = at.value / 8 % page_words_;
    const std::size_t wanted_end = first + to.size();
    to = to.first(std::min(to.size(), page_words_ - first));
    while (!load_cached(page, first, to)) {
        const PageRun wanted{page, std::min<std::size_t>(divide_up(wanted_end, page_words_), run_pages_)};
        const SetLocks locks(*this, wanted);
        auto filled = fill(wanted);
        // It may be another page that cannot be read.
        if (!filled && wanted.count > 1) filled = fill({page});
        if (!filled) {
            // The first time that is an error. If it is met again, as little as can be is unreadable.
            if (filled.error().code != Errc::io || !pages_failed_.exchange(true))
                return std::unexpected(std::move(filled).error());
            return load_sector(at, to);
        }
        if (find(set_of(page), page) < ways) continue;
        // No room, but then it is not here either: the file has what was last stored.
        std::array<std::uint64_t, max_page_words> words;
        TRY_VOID(read_pages(page, std::span(words).first(page_words_)));
        std::ranges::copy(std::span(words).subspan(first, to.size()), to.begin());
        break;
    }
    return to.size();
}

/// Under the set's lock: records that these words of a page change. Returns false if there is no room.
bool WordCache::record(std::size_t set, std::size_t way, HostOffset at, std::span<const std::uint64_t> words) const {
    auto* log = log_of(states_[set].slots[way].page_class);
    if (log == nullptr) return true;
    std::array<std::uint64_t, max_page_words> before;
    const auto* old = words_of(set, way) + at.value / 8 % page_words_;
    for (std::size_t i = 0; i < words.size(); ++i) before[i] = old[i].load(std::memory_order_relaxed);
    return log->append(at, std::span(before).first(words.size()), words);
}

Result<bool> WordCache::store(HostOffset at, std::span<const std::uint64_t> words, PageClass page_class, bool barrier) {
    const std::uint64_t page = at.value / 8 / page_words_;
    const std::size_t first = at.value / 8 % page_words_;
    assert(at.value % 8 == 0 && at.value < max_offset && first + words.size() <= page_words_);
    const std::size_t set = set_of(page);
    const std::lock_guard guard(states_[set].mutex);
    TRY_VOID(fill({page}));
    const std::size_t way = find(set, page);
    if (way == ways) return false;
    TRY_VOID(reserve_space(PageRun{page}));
    auto& slot = states_[set].slots[way];
    slot.barrier |= barrier;
    slot.page_class = page_class;
    if (!std::exchange(slot.changed, true)) {
        auto& list = list_of(page_class);
        const std::lock_guard list_guard(list.mutex);
        list.slots.push_back(set * ways + way);
    }
    // The page is listed before: whoever takes the pages after this record takes it, too, once this change is made.
    if (!record(set, way, at, words)) return false;
    change(set, way, page + 1, first, words);
    return true;
}

std::size_t WordCache::changed_count(PageClass page_class) {
    auto& list = list_of(page_class);
    const std::lock_guard guard(list.mutex);
    return list.slots.size();
}

std::vector<WordCache::Changed> WordCache::take_changed(PageClass page_class, std::size_t most) {
    std::vector<std::size_t> slots;
    {
        auto& list = list_of(page_class);
        const std::lock_guard guard(list.mutex);
        const auto end = list.slots.begin() + static_cast<std::ptrdiff_t>(std::min(most, list.slots.size()));
        slots.assign(list.slots.begin(), end);
        list.slots.erase(list.slots.begin(), end);
    }
    std::vector<Changed> pages;
    pages.reserve(slots.size());
    for (const std::size_t index : slots) {
        const std::size_t set = index / ways;
        const std::size_t way = index % ways;
        const std::lock_guard guard(states_[set].mutex);
        auto& slot = states_[set].slots[way];
        if (!slot.changed || slot.page_class != page_class) continue;  // forgotten, and used for another page maybe
        Changed page;
        page.at = {(sets_[set].tags[way].load(std::memory_order_relaxed) - 1) * page_bytes()};
        page.barrier = slot.barrier;
        page.slot = index;
        page.bytes.resize(page_bytes());
        const auto* words = words_of(set, way);
        for (std::size_t i = 0; i < page_words_; ++i)
            store_be(std::span(page.bytes), i * 8, words[i].load(std::memory_order_relaxed));
        slot.changed = slot.barrier = false;
        slot.being_written = true;
        pages.push_back(std::move(page));
    }
    std::ranges::sort(pages, {}, &Changed::at);
    return pages;
}

void WordCache::written(std::span<const Changed> pages, PageClass page_class, bool success) {
    for (const auto& page : pages) {
        const std::lock_guard guard(states_[page.slot / ways].mutex);
        auto& slot = states_[page.slot / ways].slots[page.slot % ways];
        slot.being_written = false;
        const auto tag = sets_[page.slot / ways].tags[page.slot % ways].load(std::memory_order_relaxed);
        if (success || tag != page.at.value / page_bytes() + 1) continue;
        slot.barrier |= page.barrier;
        if (!std::exchange(slot.changed, true)) {
            auto& list = list_of(page_class);
            const std::lock_guard list_guard(list.mutex);
            list.slots.push_back(page.slot);
        }
    }
}

void WordCache::forget(HostOffset begin, std::uint64_t length) {
    const std::uint64_t end = divide_up(begin.value + length, page_bytes());
    for (std::uint64_t page = begin.value / page_bytes(); page < end; ++page) {
        const std::size_t set = set_of(page);
        const std::lock_guard guard(states_[set].mutex);
        const std::size_t way = find(set, page);
        if (way == ways) continue;
        change(set, way, 0, 0, {});
        auto& slot = states_[set].slots[way];
        slot.changed = slot.barrier = false;
        states_[set].has_space &= static_cast<std::uint8_t>(~bit_of(way));
    }
}

}  // namespace qcow
