#pragma once
// The active mapping of an image that is open for writing: L2 entries and the tables that hold them.

#include <array>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "base/range_locks.h"
#include "qcow2/metadata/change.h"
#include "qcow2/view.h"

namespace qcow::qcow2 {

/// Guest clusters by number: [first, end). One L2 table maps all of them.
struct GuestClusters {
    std::uint64_t first = 0;
    std::uint64_t end = 0;
    [[nodiscard]] std::uint64_t count() const { return end - first; }
};

/// Loads entries decoded, once, and replaces them. Whoever changes entries holds their guest clusters meanwhile: see
/// lock().
///
/// Thread safety: functions may be called from any number of threads, where they do not say otherwise.
class ActiveMapping {
public:
    using L2Entry = format::L2Entry;

    /// Both outlive it. `mapping` is the active one.
    ActiveMapping(WritableMetadata& metadata, const Mapping& mapping)
        : metadata_(metadata), mapping_(mapping), rules_(metadata.metadata().rules()) {}

    /// Holds guest clusters against other changes.
    [[nodiscard]] RangeLocks::Guard lock(GuestClusters clusters) { return {clusters_, clusters.first, clusters.end}; }

    [[nodiscard]] const format::EntryRules& rules() const { return rules_; }
    [[nodiscard]] std::uint64_t cluster_of(GuestOffset at) const { return at.value >> rules_.geometry.cluster_bits; }
    [[nodiscard]] GuestOffset offset_of(std::uint64_t cluster) const {
        return {cluster << rules_.geometry.cluster_bits};
    }
    /// The cluster behind the last one that the L2 table of `cluster` maps.
    [[nodiscard]] std::uint64_t table_end(std::uint64_t cluster) const;
    /// The cluster behind the last one whose entry changes together with that of `cluster`.
    [[nodiscard]] std::uint64_t page_end(std::uint64_t cluster) const;

    /// The bytes that the disk has, and while it grows those that it will have.
    [[nodiscard]] std::uint64_t disk_size() const {
        return std::max(metadata_.metadata().disk_size(), growing_to_.load(std::memory_order_relaxed));
    }
    /// One thread; 0: the disk does not grow any more.
    void grow_to(std::uint64_t size) { growing_to_.store(size, std::memory_order_relaxed); }

    // Damage that these meet marks the image as corrupt.

    [[nodiscard]] Result<format::L1Entry> l1_entry(GuestOffset at);
    /// Returns the entries of guest clusters, which one L2 table maps. Without a table they are empty.
    [[nodiscard]] Result<std::vector<L2Entry>> load(GuestClusters clusters);

    /// Whether a write needs a new place for what the entry maps: it has none, or one that others refer to as well.
    [[nodiscard]] bool needs_new_cluster(L2Entry entry) const {
        return entry.compressed() || !entry.copied() || !rules_.has_cluster(entry);
    }

    /// Commits a change that makes `entries` those of the clusters from `first` on, up to page_end() at most, in place
    /// of `old`: all of them, or none if it fails. Drops the places that no entry keeps. The L2 table is made, or
    /// copied from one that a snapshot shares, if need be.
    Result<void> replace(Change& change, std::uint64_t first, std::span<const L2Entry> old,
                         std::span<const L2Entry> entries, Barrier barrier);

    /// Drops the table that maps the clusters from `cluster` on, with all that it leads to.
    Result<void> drop_table(std::uint64_t cluster);

    /// Makes all L2 tables shared ones: from now on each is copied before it changes. No request that changes the image
    /// may be in flight. Returns the words of the L1 table.
    Result<std::vector<std::uint64_t>> share_tables();

    /// Makes the COPIED flags agree with the refcounts. Requests may be in flight; those that change refcounts of what
    /// is mapped, in other ways than by dropping it, must not.
    Result<void> correct_copied_flags();

    /// Moves the L1 table to where it has room for so many entries.
    Result<void> grow_l1(std::uint64_t entries);

private:
    [[nodiscard]] std::mutex& table_lock(GuestOffset at) {
        return table_locks_[rules_.geometry.l1_index(at) % table_locks_.size()];
    }
    Result<HostOffset> own_table(GuestOffset at);
    Result<void> correct_copied_flags(std::uint64_t l1_index);
    void drop(Change& change, std::span<const L2Entry> old, std::span<const L2Entry> entries) const;

    WritableMetadata& metadata_;
    const Mapping& mapping_;
    const format::EntryRules rules_;
    RangeLocks clusters_;
    std::atomic<std::uint64_t> growing_to_ = 0;
    // Of the L2 table with this number, modulo their count. A move of the L1 table holds them all, and of a thread that
    // holds 64 ThreadSanitizer loses track.
    std::array<std::mutex, 32> table_locks_;
};

}  // namespace qcow::qcow2
