#include "qcow2/refcount_trimming.h"

#include <algorithm>
#include <array>

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

Result<bool> drop_refcount_blocks(const Metadata& metadata, ClusterUse& use) {
    std::set<std::uint64_t> dropped;  // clusters
    std::vector<std::uint64_t> indices;
    for (std::uint64_t index = use.blocks().size(); index-- > 0;) {
        if (use.blocks()[index].value == 0) continue;
        dropped.insert(use.blocks()[index].value >> use.cluster_bits());
        const std::uint64_t end = std::min((index + 1) * use.per_block(), use.clusters());
        bool counts_others = false;
        for (std::uint64_t at = index * use.per_block(); at < end && !counts_others; ++at) {
            at = use.references().next_used(at, end);
            counts_others = at < end && !dropped.contains(at);
        }
        if (counts_others) {
            dropped.erase(use.blocks()[index].value >> use.cluster_bits());
            break;
        }
        indices.push_back(index);
    }
    if (indices.empty()) return false;
    for (const auto index : indices) {
        constexpr std::array<std::byte, 8> none = {};
        TRY_VOID(metadata.file().write(metadata.state().refcount_table + index * 8, none));
        use.blocks()[index] = {0};
    }
    TRY_VOID(metadata.file().flush());
    TRY_VOID(release(metadata, use, std::vector(dropped.begin(), dropped.end())));
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
