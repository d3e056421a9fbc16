#include "qcow2/compact_size.h"

#include <algorithm>

#include "base/invariant.h"
#include "format/refcount.h"

namespace qcow::qcow2 {

namespace {

/// The clusters that have references.
std::uint64_t count_used(const ReferenceMap& references) {
    std::uint64_t used = 0;
    const std::uint64_t end = references.clusters();
    for (std::uint64_t at = references.next_used(0, end); at < end; at = references.next_used(at, end)) {
        const auto chunk = references.chunk_from(at);
        const auto there = chunk.first(std::min<std::uint64_t>(chunk.size(), end - at));
        used += static_cast<std::uint64_t>(std::ranges::count_if(there, [](References one) { return one.word != 0; }));
        at += there.size();
    }
    return used;
}

}  // namespace

CompactSize compact_size(const Metadata& metadata, const ReferenceMap& references, std::span<const HostOffset> blocks) {
    const auto present = std::ranges::count_if(blocks, [](HostOffset block) { return block.value != 0; });
    const std::uint64_t used = count_used(references);
    const std::uint64_t of_refcounts = static_cast<std::uint64_t>(present) + metadata.state().refcount_table_clusters;
    INVARIANT(used > of_refcounts);
    const std::uint64_t others = used - of_refcounts;
    const std::uint64_t per_block =
        format::refcounts_per_block(metadata.header().cluster_bits, metadata.header().refcount_order);
    CompactSize size{.clusters = others};
    // They count themselves: look for the numbers at which they fit.
    for (std::uint64_t clusters = 0; clusters != size.clusters;) {
        clusters = size.clusters;
        size.refcount_blocks = divide_up(clusters, per_block);
        size.refcount_table_clusters =
            std::max<std::uint64_t>(1, divide_up(size.refcount_blocks * 8, metadata.cluster_size()));
        size.clusters = others + size.refcount_blocks + size.refcount_table_clusters;
    }
    return size;
}

}  // namespace qcow::qcow2
