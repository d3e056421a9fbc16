#include "qcow2/cluster_use.h"

#include <algorithm>

#include "base/try.h"
#include "format/refcount.h"
#include "qcow2/metadata/directories.h"

namespace qcow::qcow2 {

ClusterUse::ClusterUse(const format::FixedHeader& header, std::unique_ptr<ReferenceMap> references,
                       std::vector<HostOffset> blocks)
    : cluster_bits_(header.cluster_bits),
      per_block_(format::refcounts_per_block(header.cluster_bits, header.refcount_order)),
      references_(std::move(references)),
      blocks_(std::move(blocks)) {}

Result<void> ClusterUse::find_structures(const Metadata& metadata) {
    structures_.clear();
    const auto add = [&](HostOffset at, std::uint64_t bytes) {
        const std::uint64_t count = metadata.geometry().clusters(bytes);
        if (count > 1) structures_.push_back({at.value >> cluster_bits_, count});
    };
    const auto state = metadata.state();
    add(state.refcount_table, std::uint64_t{state.refcount_table_clusters} << cluster_bits_);
    add(state.l1_table, std::uint64_t{state.l1_entries} * 8);
    if (const auto& encryption = metadata.header().encryption) add(encryption->offset, encryption->length);
    const auto snapshots = TRY(read_snapshots(metadata));
    add(state.snapshot_table, snapshots.bytes);
    for (const auto& snapshot : snapshots.entries) add(snapshot.l1_table, std::uint64_t{snapshot.l1_entries} * 8);
    if (state.bitmaps_consistent()) {
        add(state.bitmaps->directory, state.bitmaps->directory_size);
        for (const auto& bitmap : TRY(read_bitmaps(metadata))) add(bitmap.table, std::uint64_t{bitmap.table_entries} * 8);
    }
    std::ranges::sort(structures_, {}, &ClusterRun::first);
    return {};
}

void ClusterUse::follow(const Moves& moves) {
    for (auto& structure : structures_) structure.first = moved(moves, structure.first);
    std::ranges::sort(structures_, {}, &ClusterRun::first);
}

bool ClusterUse::in_structure(std::uint64_t cluster) const {
    const auto behind = std::ranges::upper_bound(structures_, cluster, {}, &ClusterRun::first);
    return behind != structures_.begin() && cluster < std::prev(behind)->end();
}

std::uint64_t ClusterUse::used_end() const {
    std::uint64_t end = 0;
    each_used_backwards(*references_, 0, references_->clusters(), [&](std::uint64_t cluster, References) {
        end = cluster + 1;
        return false;
    });
    return end;
}

std::uint64_t ClusterUse::used_behind(std::uint64_t first) const {
    std::uint64_t count = 0;
    each_used_backwards(*references_, first, references_->clusters(), [&](std::uint64_t, References) {
        ++count;
        return true;
    });
    return count;
}

std::uint64_t ClusterUse::counted_end() const {
    const auto missing = std::ranges::find(blocks_, HostOffset{0});
    return std::min(static_cast<std::uint64_t>(missing - blocks_.begin()) * per_block_, references_->clusters());
}

bool ClusterUse::are_counted(const ClusterRun& run) const {
    for (std::uint64_t index = run.first / per_block_; index * per_block_ < run.end(); ++index) {
        if (index >= blocks_.size() || blocks_[index].value == 0) return false;
    }
    return true;
}

bool ClusterUse::is_compact(const CompactSize& size) const {
    return references_->next_used(size.clusters, references_->clusters()) >= references_->clusters();
}

std::set<std::uint64_t> ClusterUse::blocks_to_drop(const CompactSize& size) const {
    std::set<std::uint64_t> clusters;
    for (std::uint64_t index = size.refcount_blocks; index < blocks_.size(); ++index) {
        if (blocks_[index].value != 0) clusters.insert(blocks_[index].value >> cluster_bits_);
    }
    return clusters;
}

std::vector<ClusterRun> ClusterUse::free_runs(std::uint64_t first, std::uint64_t end, std::uint64_t wanted,
                                              std::uint64_t least) const {
    std::vector<ClusterRun> runs;
    while (first < end && wanted > 0) {
        const std::uint64_t used = references_->next_used(first, end);
        if (const auto count = std::min(used - first, wanted); count >= least) {
            runs.push_back({first, count});
            wanted -= count;
        }
        first = used + 1;
    }
    return runs;
}

std::optional<ClusterRun> ClusterUse::find_window(const ClusterRun& structure, std::uint64_t end) const {
    std::optional<ClusterRun> best;
    std::uint64_t best_used = ~std::uint64_t{0};
    const auto used = [&](std::uint64_t cluster) { return references_->at(cluster).word != 0 ? 1U : 0U; };
    std::uint64_t first = 1;
    auto next = structures_.begin();
    while (first + structure.count <= end) {
        while (next != structures_.end() && next->end() <= first) ++next;
        const std::uint64_t limit = next == structures_.end() ? end : std::min(end, next->first);
        std::uint64_t in_use = 0;
        for (std::uint64_t at = first; at < limit; ++at) {
            in_use += used(at);
            if (at - first >= structure.count) in_use -= used(at - structure.count);
            if (at - first + 1 < structure.count || in_use >= best_used) continue;
            best_used = in_use;
            best = {at + 1 - structure.count, structure.count};
        }
        if (next == structures_.end()) break;
        first = next->end();
    }
    return best;
}

}  // namespace qcow::qcow2
