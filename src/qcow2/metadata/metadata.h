#pragma once
// The metadata of an open image: its header, and its tables through a cache.

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "base/epochs.h"
#include "format/entries.h"
#include "format/header.h"
#include "storage/word_cache.h"

namespace qcow::qcow2 {

/// The classes of pages in the cache. Each is written in an order of its own: see WriteBack.
inline constexpr WordCache::PageClass refcount_pages = 0;
inline constexpr WordCache::PageClass mapping_pages = 1;

/// Reads the metadata of one image file. An image that is open for writing changes them through WritableMetadata.
///
/// Thread safety: all functions may be called from any number of threads.
class Metadata {
public:
    /// `header` was verified by format::parse_header. `cache_bytes` is the budget of the cache.
    Metadata(const format::Header& header, std::shared_ptr<Storage> file, std::size_t cache_bytes);

    /// The part of the header that never changes.
    [[nodiscard]] const format::FixedHeader& header() const { return header_; }

    /// A copy of the part of the header that changes, as it is now.
    [[nodiscard]] format::HeaderState state() const {
        const std::lock_guard lock(state_mutex_);
        return state_;
    }

    /// The host offset of the active L1 table.
    [[nodiscard]] HostOffset active_l1() const { return {active_l1_.load(std::memory_order_acquire)}; }

    /// The virtual size in bytes that requests may reach. During a resize it differs from the header's for a while.
    [[nodiscard]] std::uint64_t disk_size() const { return disk_size_.load(std::memory_order_acquire); }

    [[nodiscard]] const format::EntryRules& rules() const { return rules_; }
    [[nodiscard]] const format::Geometry& geometry() const { return rules_.geometry; }
    [[nodiscard]] std::uint64_t cluster_size() const { return header_.cluster_size(); }

    /// The image file.
    [[nodiscard]] Storage& file() const { return *file_; }
    [[nodiscard]] const std::shared_ptr<Storage>& shared_file() const { return file_; }

    /// The words of all tables, by host offset.
    [[nodiscard]] WordCache& words() const { return words_; }
    [[nodiscard]] std::size_t cache_bytes() const { return cache_bytes_; }

    /// The length in bytes of the part of the file that tables may lie in. It includes the rest of the file's last
    /// cluster, which reads as zeros. It ends at 2^56, as entries do.
    [[nodiscard]] Result<std::uint64_t> addressable_bytes() const;

    /// Whether the file holds these bytes, and an entry can express them. Asks for the file's length only where the
    /// last answer does not do.
    [[nodiscard]] Result<bool> is_in_file(HostOffset at, std::uint64_t bytes) const;

    /// Requests that read hold one of these, so that nothing that they may be using is reused.
    [[nodiscard]] Epochs& epochs() const { return epochs_; }

    /// Whether the file ends before the L1 table does, because its writer left out a table of zeros.
    [[nodiscard]] bool l1_left_out() const { return l1_left_out_; }

    /// The length in bytes that a complete file has at least, by its refcounts. Nothing where these cannot be read.
    [[nodiscard]] std::optional<std::uint64_t> counted_end() const;

    /// A sentence about `thing` of `file`, the image file or its data file, that lies past the file's end at `at`.
    [[nodiscard]] std::string past_the_end(const Storage& file, std::string_view thing, HostOffset at) const;

    // For who writes the image, one thread at a time:

    /// The file has this header now.
    void replace_state(const format::HeaderState& state);
    /// Requests may reach the size that the header has.
    void publish_size() { disk_size_.store(state().size, std::memory_order_release); }

private:
    mutable Epochs epochs_;  // aligned to cache lines
    const format::FixedHeader header_;
    const format::EntryRules rules_;
    const std::shared_ptr<Storage> file_;
    const std::size_t cache_bytes_;
    mutable WordCache words_;

    mutable std::mutex state_mutex_;
    format::HeaderState state_;
    std::atomic<std::uint64_t> active_l1_;  // of the state
    std::atomic<std::uint64_t> disk_size_;

    mutable std::atomic<std::uint64_t> known_file_size_ = 0;  // the file has at least this many bytes
    mutable std::once_flag counted_end_once_;
    bool l1_left_out_ = false;
    mutable std::optional<std::uint64_t> counted_end_;
};

}  // namespace qcow::qcow2
