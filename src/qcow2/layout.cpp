#include "qcow2/layout.h"

#include <algorithm>

#include "base/bits.h"
#include "base/try.h"
#include "format/refcount.h"

namespace qcow::qcow2 {

RefcountClusters refcount_clusters(std::uint64_t clusters, unsigned cluster_bits, unsigned refcount_order) {
    const std::uint64_t per_block = format::refcounts_per_block(cluster_bits, refcount_order);
    RefcountClusters refcounts;
    // Blocks and table count themselves: look for the sizes at which everything fits.
    for (std::uint64_t total = clusters + 1; total != clusters + refcounts.blocks + refcounts.table;) {
        total = clusters + refcounts.blocks + refcounts.table;
        refcounts.blocks = divide_up(total, per_block);
        refcounts.table = divide_up(refcounts.blocks * 8, bit(cluster_bits));
    }
    return refcounts;
}

Result<void> verify_refcounts_fit(const RefcountClusters& refcounts, unsigned cluster_bits) {
    if (refcounts.table <= format::max_refcount_table_bytes >> cluster_bits) return {};
    return fail(Errc::limit_exceeded, "refcount table", "it would be larger than 8 MiB; use larger clusters");
}

EmptyClusters::EmptyClusters(const format::Header& header, Preallocation preallocation) {
    const bool raw_data_file = (header.autoclear & format::autoclear::raw_external_data) != 0;
    if (preallocation != Preallocation::off || raw_data_file) {
        holes = Recorded::cluster;
        zeros = Recorded::cluster;
    } else if (header.version < 3) {
        zeros = Recorded::cluster;  // version 2 has no entries for zeros
    }
}

void SpaceCount::add(std::uint64_t begin, std::uint64_t end, Recorded recorded) {
    if (recorded == Recorded::nothing || begin == end) return;
    if (recorded == Recorded::cluster) data_clusters_ += geometry_.clusters(end) - begin / geometry_.cluster_size();
    const std::uint64_t first = std::max(next_table_, geometry_.l1_index({begin}));
    next_table_ = std::max(next_table_, geometry_.l1_index({end - 1}) + 1);
    l2_tables_ += next_table_ - std::min(first, next_table_);
}

std::uint64_t SpaceCount::counted_clusters() const {
    const std::uint64_t l1_clusters = geometry_.clusters(std::uint64_t{header_.l1_entries} * 8);
    const bool elsewhere = header_.has(format::incompatible::external_data);
    const std::uint64_t encryption_clusters = header_.encryption ? geometry_.clusters(header_.encryption->length) : 0;
    return 1 + l1_clusters + encryption_clusters + l2_tables_ + (elsewhere ? 0 : data_clusters_);
}

RefcountClusters SpaceCount::refcounts() const {
    return refcount_clusters(counted_clusters(), header_.cluster_bits, header_.refcount_order);
}

std::uint64_t SpaceCount::file_bytes() const {
    const auto [blocks, table] = refcounts();
    return (counted_clusters() + blocks + table) << header_.cluster_bits;
}

Result<void> SpaceCount::verify_fits() const { return verify_refcounts_fit(refcounts(), header_.cluster_bits); }

}  // namespace qcow::qcow2
