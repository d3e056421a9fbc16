#pragma once
// A cache of the 64-bit big-endian words of a file, by host offset.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "qcow/error.h"
#include "qcow/offset.h"
#include "qcow/storage.h"
#include "storage/redo_log.h"

namespace qcow {

/// Holds the words of a file in pages of at most 4 KiB, `budget_bytes` of them in all whatever the file's size. Memory
/// is taken page by page as it is used. Words that are stored stay here until somebody takes their pages to write them.
///
/// Thread-safe. A load that hits takes no lock and writes nothing that others read: each page carries a version that
/// changes when its contents do, and a reader that sees it change starts over (a seqlock). A miss locks the set of
/// pages that the new one goes into, so that threads that miss the same page read it once.
class WordCache {
public:
    /// `page_bytes`: a power of two from 512 to 4096, not larger than a cluster, so that no page mixes clusters.
    WordCache(std::shared_ptr<Storage> storage, std::size_t page_bytes, std::size_t budget_bytes);

    /// Copies the words from host offset `at` on (a multiple of 8 below 2^56) into `to`, in host byte order, as many as
    /// the page of `at` has from there on but no more than `to` takes. Gives how many: at least one. Words past the end
    /// of the file are zeros: callers hold tables against its length. The pages that the rest of `to` covers are read
    /// with this one, for the calls that follow. Errc::io: the page cannot be read. Once that has happened, such pages
    /// are read by sectors of 512 bytes, so that another try may succeed.
    Result<std::size_t> load(HostOffset at, std::span<std::uint64_t> to);

    /// One word.
    Result<std::uint64_t> load(HostOffset at) {
        std::uint64_t word = 0;
        if (auto done = load(at, {&word, 1}); !done) return std::unexpected(std::move(done).error());
        return word;
    }

    /// Changed pages are listed by class, so that those of one can be written before those of another.
    using PageClass = std::uint8_t;
    static constexpr PageClass page_classes = 2;

    /// Changes words that lie in one page, all at once for every reader. The page has space in the file before it
    /// changes, so that writing it later needs none. `barrier`: the page may be written only after a flush that begins
    /// from now on. False, and nothing changed, where there is no room in the cache because all pages that this one
    /// could replace are changed: take some, write them, and try again. Callers see to it that no two stores to the
    /// same word run at once. Errc::io, no_space.
    Result<bool> store(HostOffset at, std::span<const std::uint64_t> words, PageClass page_class, bool barrier = false);

    /// Gives the pages of [at, at + length) space in the file ahead of stores, which then cannot fail for want of it. A
    /// range takes fewer calls to the system than its pages do one by one. Errc::io, no_space.
    Result<void> reserve_space(HostOffset at, std::uint64_t length);

    /// Records the stores of a class from now on, before anybody sees them; null: none. A store that finds no room in
    /// the log fails as one that finds none in the cache. Nobody stores words of this class or takes pages of it
    /// meanwhile.
    void record_in(std::unique_ptr<RedoLog> log, PageClass page_class) { logs_[page_class] = std::move(log); }
    [[nodiscard]] RedoLog* log_of(PageClass page_class) const { return logs_[page_class].get(); }

    /// A changed page as it was when it was taken.
    struct Changed {
        HostOffset at;
        std::vector<std::byte> bytes;
        bool barrier = false;
        std::size_t slot = 0;
    };

    /// At most so many pages of a class are changed: once as many were taken, all that are changed now have been.
    [[nodiscard]] std::size_t changed_count(PageClass page_class);

    /// Takes up to `most` changed pages of a class, those first that were changed first. They stay in the cache, and
    /// are not replaced until they are given to written(). One thread at a time for each class.
    std::vector<Changed> take_changed(PageClass page_class, std::size_t most);

    /// They have been written; or not, and count as changed again.
    void written(std::span<const Changed> pages, PageClass page_class, bool success);

    /// Drops the pages of [begin, begin + length), changed or not: what they are about is no longer metadata.
    void forget(HostOffset begin, std::uint64_t length);

    [[nodiscard]] std::size_t page_bytes() const { return page_words_ * 8; }

private:
    static constexpr std::size_t ways = 8;

    struct alignas(64) Set {
        std::array<std::atomic<std::uint64_t>, ways> tags = {};      // the page's number plus one; 0: no page
        std::array<std::atomic<std::uint64_t>, ways> versions = {};  // odd while the page is being changed
    };
    struct Slot {
        bool changed = false;
        bool barrier = false;
        bool being_written = false;
        PageClass page_class = 0;
        [[nodiscard]] bool replaceable() const { return !changed && !being_written; }
    };
    struct SetState {
        std::mutex mutex;
        std::uint8_t next_victim = 0;
        std::uint8_t has_space = 0;  // bits of ways whose pages are known to have it, in the file
        std::array<Slot, ways> slots = {};
    };
    struct ChangedList {
        std::mutex mutex;
        std::deque<std::size_t> slots;
    };

    /// Pages one behind the other, at most run_pages_. They are read, or given space, with one call.
    struct PageRun {
        std::uint64_t first = 0;
        std::size_t count = 1;
        [[nodiscard]] std::uint64_t end() const { return first + count; }
    };
    class SetLocks;

    [[nodiscard]] std::size_t set_of(std::uint64_t page) const;
    [[nodiscard]] std::atomic<std::uint64_t>* words_of(std::size_t set, std::size_t way) const {
        return words_.get() + (set * ways + way) * page_words_;
    }
    [[nodiscard]] std::size_t find(std::size_t set, std::uint64_t page) const;
    bool load_cached(std::uint64_t page, std::size_t first, std::span<std::uint64_t> to) const;
    [[nodiscard]] std::size_t replaceable_way(std::size_t set);
    Result<void> fill(PageRun run);
    Result<void> reserve_space(PageRun run);
    Result<void> read_pages(std::uint64_t first, std::span<std::uint64_t> to) const;
    Result<std::size_t> load_sector(HostOffset at, std::span<std::uint64_t> to) const;
    void change(std::size_t set, std::size_t way, std::uint64_t tag, std::size_t first,
                std::span<const std::uint64_t> words);
    [[nodiscard]] bool record(std::size_t set, std::size_t way, HostOffset at,
                              std::span<const std::uint64_t> words) const;
    ChangedList& list_of(PageClass page_class) { return changed_[page_class]; }

    struct Free {
        void operator()(void* memory) const;
    };

    std::shared_ptr<Storage> storage_;
    std::size_t page_words_;
    std::size_t set_count_;  // a power of two
    std::size_t run_pages_;  // the longest PageRun: pages of one run must not replace each other where sets are few
    std::unique_ptr<Set[]> sets_;
    std::unique_ptr<SetState[]> states_;
    std::atomic<bool> pages_failed_ = false;  // to be read as a whole
    std::unique_ptr<std::atomic<std::uint64_t>[], Free> words_;
    std::array<ChangedList, page_classes> changed_;
    std::array<std::unique_ptr<RedoLog>, page_classes> logs_;
};

}  // namespace qcow
