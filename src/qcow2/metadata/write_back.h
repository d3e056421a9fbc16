#pragma once
// In which order changes reach the disk.

#include <atomic>
#include <functional>
#include <mutex>
#include <span>
#include <type_traits>

#include "base/within_memory.h"
#include "format/header_edit.h"
#include "qcow2/metadata/metadata.h"

namespace qcow::qcow2 {

/// Writes the changed pages of the cache, and the header, so that at every instant what is on disk is consistent:
///
/// * A page of refcounts may be written at any time: a count goes up in the cache before anything refers to the
///   cluster, and down only after nothing on disk does any more.
/// * A page of the mapping may be written once the refcounts are, and what its entries lead to: at any time for
///   clusters that were reserved (counted and zero on disk), after a flush of data and refcounts for what it marks as
///   `barrier`.
///
/// Where that order broke, because a flush failed, nothing is believed any more: every further change is refused.
/// Thread-safe.
class WriteBack {
public:
    /// `data_file` is flushed before the image file; null: there is none apart.
    WriteBack(Metadata& metadata, Storage* data_file, bool flushes)
        : metadata_(metadata), data_file_(data_file), flushes_(flushes) {}

    /// Does work that changes the image. If memory runs out it is left half done, as by a power loss, and as after one
    /// what is on disk is consistent: as long as nothing more is written.
    template <class Work>
    std::invoke_result_t<Work> attempt(Work&& work) {
        auto result = within_memory(work);
        if (!result && result.error().code == Errc::no_memory) return stop(std::move(result).error());
        return result;
    }

    /// Errc::io, corrupt: why the image can no longer be written.
    [[nodiscard]] Result<void> verify_writable() const {
        return stopped_.load(std::memory_order_acquire) ? why_stopped() : Result<void>();
    }

    /// Changes words in the cache; see WordCache::store. Writes pages where there is no room.
    Result<void> store(HostOffset at, std::span<const std::uint64_t> words, WordCache::PageClass page_class,
                       bool barrier = false);

    /// Writes all refcounts that were changed when it was called. Does not flush.
    Result<void> write_refcounts();

    /// Records changes of the mapping in this memory from now on. Everything has been written, and nobody changes the
    /// mapping meanwhile.
    void record_in(SurvivingMemory memory);

    /// Writes everything in the cache that was changed when it was called, flushing where the order needs it, but not
    /// at the end.
    Result<void> write_all();

    /// Makes durable what was written. A failure stops all writing.
    Result<void> sync();

    /// Changes the header, in memory once it is written to the file. Does not flush. A write that fails stops all
    /// writing.
    Result<void> update_header(const std::function<void(format::HeaderState&)>& change);

    /// Changes the state and extensions of the header in one step, durably. In memory, only the state changes. A write
    /// that fails stops all writing. Errors: Errc::limit_exceeded: it does not fit, and nothing has changed; io.
    Result<void> edit_header(const std::function<void(format::HeaderEdit&, format::HeaderState&)>& edit);

    /// Refuses all changes from now on, because of this error: what the file holds can no longer be told.
    std::unexpected<Error> stop(Error why);

    /// Marks the image as corrupt on disk, and stops all writing. Gives the error to report. `damage` says what is
    /// wrong, with the file's name in front of its place; `place` is within the file.
    std::unexpected<Error> declare_corrupt(Error damage, std::string_view remedy = "check it");
    std::unexpected<Error> declare_corrupt(const std::string& place, const std::string& what);

private:
    Result<void> write_pages(std::span<const WordCache::Changed> pages, WordCache::PageClass page_class);
    [[nodiscard]] Result<void> why_stopped() const;

    Metadata& metadata_;
    Storage* data_file_;
    bool flushes_;
    std::mutex mapping_mutex_;   // one writer of mapping pages
    std::mutex refcount_mutex_;  // one writer of refcount pages
    std::mutex header_mutex_;
    std::atomic<bool> stopped_ = false;
    mutable std::mutex stop_mutex_;
    Error why_;
};

}  // namespace qcow::qcow2
