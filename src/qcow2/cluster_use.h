#pragma once
// What the host clusters of an image file are used for, while they move.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "qcow2/cluster_moves.h"
#include "qcow2/compact_size.h"
#include "qcow2/metadata/refcounts.h"
#include "qcow2/reference_map.h"

namespace qcow::qcow2 {

/// Calls visit(cluster, references) for each cluster from `end` - 1 down to `first`, until it returns false.
template <class Visit>
void each_backwards(const ReferenceMap& references, std::uint64_t first, std::uint64_t end, const Visit& visit) {
    while (end > first) {
        const std::uint64_t begin = std::max(first, align_down(end - 1, ReferenceMap::chunk_clusters));
        const auto chunk = references.chunk_from(begin);
        for (std::uint64_t cluster = end; cluster-- > begin;) {
            if (!visit(cluster, chunk.empty() ? References{} : chunk[cluster - begin])) return;
        }
        end = begin;
    }
}

/// The same for clusters that have references.
template <class Visit>
void each_used_backwards(const ReferenceMap& references, std::uint64_t first, std::uint64_t end, const Visit& visit) {
    while (end > first) {
        const std::uint64_t begin = std::max(first, align_down(end - 1, ReferenceMap::chunk_clusters));
        bool goes_on = true;
        if (!references.chunk_from(begin).empty()) {
            each_backwards(references, begin, end, [&](std::uint64_t cluster, References one) {
                return goes_on = one.word == 0 || visit(cluster, one);
            });
        }
        if (!goes_on) return;
        end = begin;
    }
}

/// The clusters of an image without leaks: which are in use, which are counted, and which lie in tables of several
/// clusters. Whoever changes the image says so here. Not thread-safe.
class ClusterUse {
public:
    /// `references` and `blocks` are as diagnose() found them.
    ClusterUse(const format::FixedHeader& header, std::unique_ptr<ReferenceMap> references,
               std::vector<HostOffset> blocks);

    /// Finds the structures of several clusters, which have to lie one behind the other.
    Result<void> find_structures(const Metadata& metadata);
    /// The structures are where these moves have brought them.
    void follow(const Moves& moves);

    [[nodiscard]] ReferenceMap& references() const { return *references_; }
    /// The refcount blocks by index in the refcount table, 0 for none.
    [[nodiscard]] std::vector<HostOffset>& blocks() { return blocks_; }
    [[nodiscard]] std::span<const HostOffset> blocks() const { return blocks_; }
    /// The structures of several clusters, by their places.
    [[nodiscard]] std::span<const ClusterRun> structures() const { return structures_; }
    [[nodiscard]] bool in_structure(std::uint64_t cluster) const;

    [[nodiscard]] unsigned cluster_bits() const { return cluster_bits_; }
    /// The clusters that a refcount block counts.
    [[nodiscard]] std::uint64_t per_block() const { return per_block_; }
    /// The cluster behind the last one that the references tell of.
    [[nodiscard]] std::uint64_t clusters() const { return references_->clusters(); }

    /// The cluster behind the last one in use.
    [[nodiscard]] std::uint64_t used_end() const;
    /// The clusters in use from `first` on.
    [[nodiscard]] std::uint64_t used_behind(std::uint64_t first) const;
    /// The end of the clusters that refcount blocks count without a gap.
    [[nodiscard]] std::uint64_t counted_end() const;
    /// Whether refcount blocks count all clusters of the run.
    [[nodiscard]] bool are_counted(const ClusterRun& run) const;
    /// Whether nothing lies behind the end that the file is to have.
    [[nodiscard]] bool is_compact(const CompactSize& size) const;
    /// The clusters of the refcount blocks that will count nothing.
    [[nodiscard]] std::set<std::uint64_t> blocks_to_drop(const CompactSize& size) const;

    /// The first runs of free clusters in [first, end): up to `wanted` clusters, in runs of at least `least`.
    [[nodiscard]] std::vector<ClusterRun> free_runs(std::uint64_t first, std::uint64_t end, std::uint64_t wanted,
                                                    std::uint64_t least = 1) const;
    /// The place in front of `end` for a structure in which the fewest clusters are used, none of them by a structure.
    [[nodiscard]] std::optional<ClusterRun> find_window(const ClusterRun& structure, std::uint64_t end) const;

private:
    const unsigned cluster_bits_;
    const std::uint64_t per_block_;
    const std::unique_ptr<ReferenceMap> references_;
    std::vector<HostOffset> blocks_;
    std::vector<ClusterRun> structures_;  // by `first`
};

}  // namespace qcow::qcow2
