#pragma once
// A cache of metadata: 64-bit words of an image file (L1, L2 and refcount tables), by host offset.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>

#include "qcow/error.h"
#include "qcow/offset.h"
#include "qcow/storage.h"

namespace qcow {

/// Holds the words of a file in pages of at most 4 KiB, `budget_bytes` of them in all whatever the file's size. Memory
/// is taken page by page as it is used.
///
/// Thread-safe. A load that hits takes no lock and writes nothing that others read: each page carries a version that
/// changes when its contents do, and a reader that sees it change starts over (a seqlock). A miss locks the set of
/// pages that the new one goes into, so that threads that miss the same page read it once.
class WordCache {
public:
    /// `page_bytes`: a power of two from 512 to 4096, not larger than a cluster, so that no page mixes clusters.
    WordCache(std::shared_ptr<const Storage> storage, std::size_t page_bytes, std::size_t budget_bytes);

    /// Copies the words from host offset `at` on (a multiple of 8 below 2^56) into `to`, in host byte order, as many as
    /// the page of `at` has from there on but no more than `to` takes. Gives how many: at least one. Words past the end
    /// of the file are zeros: callers hold tables against its length. Errc::io.
    Result<std::size_t> load(HostOffset at, std::span<std::uint64_t> to);

    /// One word.
    Result<std::uint64_t> load(HostOffset at) {
        std::uint64_t word = 0;
        if (auto done = load(at, {&word, 1}); !done) return std::unexpected(std::move(done).error());
        return word;
    }

private:
    static constexpr std::size_t ways = 8;

    // A tag is the page's number plus one, shifted, and a version in the low bits; 0 in the high bits: no page, or one
    // that is being replaced.
    static constexpr unsigned version_bits = 16;

    struct alignas(64) Set {
        std::array<std::atomic<std::uint64_t>, ways> tags = {};
    };
    struct SetLock {
        std::mutex mutex;
        std::uint8_t next_victim = 0;
    };

    [[nodiscard]] std::size_t set_of(std::uint64_t page) const;
    [[nodiscard]] std::atomic<std::uint64_t>* words_of(std::size_t set, std::size_t way) const {
        return words_.get() + (set * ways + way) * page_words_;
    }
    bool load_cached(std::uint64_t page, std::size_t first, std::span<std::uint64_t> to) const;
    Result<void> fill(std::uint64_t page);

    struct Free {
        void operator()(void* memory) const;
    };

    std::shared_ptr<const Storage> storage_;
    std::size_t page_words_;
    std::size_t set_count_;  // a power of two
    std::unique_ptr<Set[]> sets_;
    std::unique_ptr<SetLock[]> locks_;
    std::unique_ptr<std::atomic<std::uint64_t>[], Free> words_;
};

}  // namespace qcow
