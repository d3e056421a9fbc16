#include "qcow2/new_clusters.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/bits.h"
#include "base/try.h"
#include "format/refcount.h"

namespace qcow::qcow2 {

NewClusters::NewClusters(const Metadata& metadata, const Diagnosis& diagnosis, Room room)
    : metadata_(metadata),
      diagnosis_(diagnosis),
      room_(std::move(room)),
      cluster_bits_(metadata.geometry().cluster_bits),
      per_block_(format::refcounts_per_block(cluster_bits_, metadata.header().refcount_order)),
      inside_end_(room_.inside ? diagnosis.file_bytes >> cluster_bits_ : 0),
      first_(divide_up(diagnosis.file_bytes, bit(cluster_bits_))) {
    // A preallocated cluster may lie right behind the end of the file.
    if (diagnosis.references->at(first_).word != 0) ++first_;
    if (!room_.fixed_size) return;
    for (std::uint64_t cluster = 0; cluster < inside_end_;) {
        const std::uint64_t used = diagnosis.references->next_used(cluster, inside_end_);
        free_inside_ += used - cluster;
        cluster = used + 1;
    }
}

Result<HostOffset> NewClusters::allocate(std::uint64_t count) {
    if (const auto inside = TRY(find_inside(count))) {
        for (std::uint64_t i = 0; i < count; ++i) inside_.emplace(*inside + i, 0);
        return HostOffset{*inside << cluster_bits_};
    }
    if (room_.fixed_size) {
        return fail(Errc::no_space, metadata_.file().name(),
                    fmt::format("the repair needs a row of {} free clusters, and the device cannot grow", count));
    }
    const HostOffset at{end() << cluster_bits_};
    counts_.resize(counts_.size() + count);
    return at;
}

void NewClusters::refer(HostOffset at, std::uint64_t clusters, std::uint64_t count) {
    const std::uint64_t begin = at.value >> cluster_bits_;
    for (std::uint64_t cluster = begin; cluster < begin + clusters; ++cluster)
        (cluster < first_ ? inside_[cluster] : counts_[cluster - first_]) += count;
}

std::uint64_t NewClusters::count(std::uint64_t cluster) const {
    if (cluster >= first_) return cluster < end() ? counts_[cluster - first_] : 0;
    if (inside_.empty()) return 0;
    const auto found = inside_.find(cluster);
    return found == inside_.end() ? 0 : found->second;
}

bool NewClusters::any(std::uint64_t first, std::uint64_t end) const {
    const auto inside = inside_.lower_bound(first);
    return (inside != inside_.end() && inside->first < end) ||
           (this->end() > first && end > first_ && !counts_.empty());
}

/// Looks only where a refcount block has something else to count, so that no block is needed for the new cluster.
Result<std::optional<std::uint64_t>> NewClusters::find_inside(std::uint64_t count) {
    const auto& references = *diagnosis_.references;
    for (std::uint64_t range = 0; range < inside_end_;) {
        const std::uint64_t used = references.next_used(range, inside_end_);
        if (used >= inside_end_) break;
        range = used / per_block_ * per_block_;
        const std::uint64_t end = std::min(range + per_block_, inside_end_);
        for (std::uint64_t begin = std::max(range, search_from_); begin < end;) {
            std::uint64_t next = begin;
            while (next < end && next - begin < count && TRY(is_free(next))) ++next;
            if (next - begin == count) {
                if (count == 1) search_from_ = next;
                return begin;
            }
            begin = next + 1;
        }
        range = end;
    }
    if (count == 1) search_from_ = inside_end_;
    return std::nullopt;
}

Result<bool> NewClusters::is_free(std::uint64_t cluster) {
    if (diagnosis_.references->at(cluster).word != 0 || inside_.contains(cluster) || room_.taken.contains(cluster))
        return false;
    const auto refcount = TRY(refcount_of(cluster));
    if (refcount && *refcount == 0) return true;
    return !diagnosis_.uncounted && (!refcount || room_.fixed_size);
}

/// Nothing where no block tells it, or one that something else uses, too.
Result<std::optional<std::uint64_t>> NewClusters::refcount_of(std::uint64_t cluster) {
    const std::size_t index = cluster / per_block_;
    if (index >= diagnosis_.blocks.size()) return std::nullopt;
    const auto at = diagnosis_.blocks[index];
    if (at.value == 0 || diagnosis_.references->at(at.value >> cluster_bits_).count() != 1) return std::nullopt;
    if (block_index_ != index) {
        block_.resize(bit(cluster_bits_));
        TRY(metadata_.file().read(at, block_));
        block_index_ = index;
    }
    return format::refcount_at(block_, cluster - index * per_block_, metadata_.header().refcount_order);
}

}  // namespace qcow::qcow2
