#include "qcow2/refcount_trimming.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <map>
#include <ranges>
#include <set>
#include <vector>

#include "base/endian.h"
#include "base/try.h"
#include "format/refcount.h"
#include "qcow2/refcount_edits.h"
#include "qcow2/repair_directories.h"

namespace qcow::qcow2 {
namespace {

/// Makes clusters free to which nothing leads any more.
Result<void> release(const Metadata& metadata, ClusterUse& use, const std::vector<std::uint64_t>& clusters) {
    RefcountEdits refcounts(metadata, use.blocks());
    for (const auto cluster : clusters) {
        TRY_VOID(use.references().set(cluster, {}));
        if (TRY(refcounts.get(cluster)) != 0) TRY_VOID(refcounts.set(cluster, 0));
    }
    TRY_VOID(refcounts.write());
    return metadata.file().flush();
}

}  // namespace

namespace {

/// The first index from which on the blocks count nothing but each other.
std::uint64_t end_of_needed_blocks(const ClusterUse& use) {
    std::set<std::uint64_t> blocks;  // their clusters
    for (const auto& block : use.blocks()) {
        if (block.value != 0) blocks.insert(block.value >> use.cluster_bits());
    }
    std::uint64_t end = 0;
    each_used_backwards(use.references(), 0, use.clusters(), [&](std::uint64_t cluster, References) {
        if (blocks.contains(cluster)) return true;
        end = cluster / use.per_block() + 1;
        return false;
    });
    // The blocks that stay are counted, too.
    for (std::uint64_t index = 0; index < std::min<std::uint64_t>(end, use.blocks().size()); ++index) {
        const std::uint64_t cluster = use.blocks()[index].value >> use.cluster_bits();
        end = std::max(end, cluster / use.per_block() + 1);
    }
    return end;
}

}  // namespace

Result<bool> drop_refcount_blocks(const Metadata& metadata, ClusterUse& use) {
    std::map<std::uint64_t, std::uint64_t> left;  // indices, by the cluster of the block
    for (std::uint64_t index = end_of_needed_blocks(use); index < use.blocks().size(); ++index) {
        if (use.blocks()[index].value != 0) left.emplace(use.blocks()[index].value >> use.cluster_bits(), index);
    }
    if (left.empty()) return false;
    std::vector<std::uint64_t> dropped;  // clusters
    // A block goes after those that it counts.
    while (!left.empty()) {
        std::map<std::uint64_t, std::uint64_t> counted;  // others that are left, by the index of the block that counts
        for (const auto& [cluster, index] : left) {
            if (cluster / use.per_block() != index) ++counted[cluster / use.per_block()];
        }
        std::vector<std::uint64_t> clusters;
        for (const auto& [cluster, index] : left) {
            if (!counted.contains(index)) clusters.push_back(cluster);
        }
        // Those that count each other go together.
        if (clusters.empty()) std::ranges::copy(std::views::keys(left), std::back_inserter(clusters));
        for (const auto cluster : clusters) {
            constexpr std::array<std::byte, 8> none = {};
            const auto index = left.extract(cluster).mapped();
            TRY_VOID(metadata.file().write(metadata.state().refcount_table + index * 8, none));
            use.blocks()[index] = {0};
            dropped.push_back(cluster);
        }
        TRY_VOID(metadata.file().flush());
    }
    TRY_VOID(release(metadata, use, dropped));
    return true;
}

Result<bool> shrink_refcount_table(const Metadata& metadata, ClusterUse& use) {
    auto state = metadata.state();
    std::uint64_t entries = use.blocks().size();
    while (entries > 0 && use.blocks()[entries - 1].value == 0) --entries;
    const std::uint64_t needed = std::max<std::uint64_t>(1, metadata.geometry().clusters(entries * 8));
    if (needed >= state.refcount_table_clusters) return false;
    const std::uint64_t first = state.refcount_table.value >> use.cluster_bits();
    std::vector<std::uint64_t> tail;
    for (std::uint64_t i = needed; i < state.refcount_table_clusters; ++i) tail.push_back(first + i);
    state.refcount_table_clusters = static_cast<std::uint32_t>(needed);
    TRY_VOID(write_header(metadata.file(), TRY(header_steps(metadata.file(), state))));
    use.blocks().resize(needed << (use.cluster_bits() - 3));
    TRY_VOID(release(metadata, use, tail));
    return true;
}

Result<bool> add_refcount_block(const Metadata& metadata, ClusterUse& use, const CompactSize& size) {
    if (use.is_compact(size)) return false;
    for (std::uint64_t index = 0; index < std::min<std::uint64_t>(size.refcount_blocks, use.blocks().size()); ++index) {
        if (use.blocks()[index].value != 0) continue;
        const std::uint64_t cluster = index * use.per_block();
        std::vector<std::byte> block(metadata.cluster_size());
        format::set_refcount(block, 0, metadata.header().refcount_order, 1);
        const HostOffset at{cluster << use.cluster_bits()};
        TRY_VOID(metadata.file().write(at, block));
        TRY_VOID(metadata.file().flush());
        std::array<std::byte, 8> word = {};
        store_be(word, 0, at.value);
        TRY_VOID(metadata.file().write(metadata.state().refcount_table + index * 8, word));
        TRY_VOID(metadata.file().flush());
        use.blocks()[index] = at;
        TRY_VOID(use.references().add(cluster, 1, 1, References::metadata));
        return true;
    }
    return false;
}

}  // namespace qcow::qcow2
