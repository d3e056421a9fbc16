#include "qcow2/repair_refcounts.h"

#include <algorithm>

#include "base/endian.h"
#include "base/try.h"
#include "format/refcount.h"

namespace qcow::qcow2 {
namespace {

std::uint64_t refcounts_per_block(const Metadata& metadata) {
    return format::refcounts_per_block(metadata.geometry().cluster_bits, metadata.header().refcount_order);
}

/// The references of the clusters that one block counts.
class BlockCounts {
public:
    BlockCounts(const ReferenceMap& references, const NewClusters& added) : references_(references), added_(added) {}

    /// Whether no cluster from `first` to `end` - 1 has a reference.
    [[nodiscard]] bool none(std::uint64_t first, std::uint64_t end) const {
        const std::uint64_t known = std::min(end, references_.clusters());
        if (first < known && references_.next_used(first, known) < known) return false;
        return !added_.any(first, end);
    }

    /// Calls visit(cluster, count) for each cluster from `first` to `end` - 1.
    template <class Visit>
    void each(std::uint64_t first, std::uint64_t end, const Visit& visit) const {
        while (first < end) {
            const std::uint64_t piece =
                std::min(end - first, ReferenceMap::chunk_clusters - first % ReferenceMap::chunk_clusters);
            const auto chunk =
                first < references_.clusters() ? references_.chunk_from(first) : std::span<const References>();
            for (std::uint64_t i = 0; i < piece; ++i, ++first)
                visit(first, (i < chunk.size() ? chunk[i].count() : 0) + added_.count(first));
        }
    }

private:
    const ReferenceMap& references_;
    const NewClusters& added_;
};

/// Calls change(block, cluster, index, found, count) for each refcount that differs from the references.
template <class Change>
Result<void> each_difference(const CountedClusters& counted, Storage* file, const Change& change) {
    const auto& metadata = counted.metadata;
    const unsigned order = metadata.header().refcount_order;
    const std::uint64_t most = format::max_refcount(order);
    const std::uint64_t per_block = refcounts_per_block(metadata);
    const BlockCounts counts(*counted.diagnosis.references, counted.added);
    std::vector<std::byte> block(metadata.geometry().cluster_size());
    for (std::size_t index = 0; index < counted.diagnosis.blocks.size(); ++index) {
        const auto at = counted.diagnosis.blocks[index];
        if (at.value == 0) continue;
        const std::uint64_t first = index * per_block;
        const bool unused = counts.none(first, first + per_block);
        if (unused && TRY(is_hole(metadata.file(), at, block.size()))) continue;
        TRY(metadata.file().read(at, block));
        if (unused && is_zero(block)) continue;
        bool changed = false;
        counts.each(first, first + per_block, [&](std::uint64_t cluster, std::uint64_t count) {
            const std::uint64_t found = format::refcount_at(block, cluster - first, order);
            // More references than a refcount can express look like the most that it can.
            if (std::min(count, most) == std::min<std::uint64_t>(found, References::max_count)) return;
            if (!change(cluster, found, std::min(count, most))) return;
            format::set_refcount(block, cluster - first, order, std::min(count, most));
            changed = true;
        });
        if (changed && file != nullptr) TRY_VOID(file->write(at, block));
    }
    return {};
}

}  // namespace

bool CountedClusters::are_covered() const {
    const std::uint64_t per_block = refcounts_per_block(metadata);
    const auto has_block = [&](std::uint64_t cluster) {
        const std::uint64_t index = cluster / per_block;
        return index < diagnosis.blocks.size() && diagnosis.blocks[index].value != 0;
    };
    const auto& references = *diagnosis.references;
    for (std::uint64_t cluster = 0; cluster < references.clusters();) {
        cluster = references.next_used(cluster, references.clusters());
        if (cluster < references.clusters() && !has_block(cluster)) return false;
        cluster = (cluster / per_block + 1) * per_block;
    }
    for (std::uint64_t cluster = added.first(); cluster < added.end(); ++cluster) {
        if (!has_block(cluster)) return false;
    }
    return true;
}

Result<bool> raise_refcounts(const CountedClusters& counted, Storage& file) {
    bool raised = false;
    TRY_VOID(each_difference(
        counted, &file,
        [&](std::uint64_t, std::uint64_t found, std::uint64_t count) {
            raised |= found < count;
            return found < count;
        }));
    return raised;
}

Result<LoweredRefcounts> lower_refcounts(const CountedClusters& counted, Storage* file, Lower which) {
    LoweredRefcounts lowered;
    const unsigned cluster_bits = counted.metadata.geometry().cluster_bits;
    const std::uint64_t file_clusters = counted.metadata.geometry().clusters(counted.diagnosis.file_bytes);
    TRY_VOID(each_difference(
        counted, file,
        [&](std::uint64_t cluster, std::uint64_t found, std::uint64_t count) {
            if (found < count || (count != 0 && which == Lower::to_zero)) return false;
            if (count != 0) {
                ++lowered.to_use;
                return true;
            }
            ++lowered.to_zero;
            if (file == nullptr || cluster >= file_clusters) return true;
            const HostOffset at{cluster << cluster_bits};
            auto& freed = lowered.freed;
            if (!freed.empty() && freed.back().first + freed.back().second == at) {
                freed.back().second += bit(cluster_bits);
            } else {
                freed.emplace_back(at, bit(cluster_bits));
            }
            return true;
        }));
    return lowered;
}

Result<NewRefcounts> write_new_refcounts(const Metadata& metadata, const Diagnosis& diagnosis, NewClusters& added,
                                         Storage& file) {
    const std::uint64_t per_block = refcounts_per_block(metadata);
    const std::uint64_t cluster_size = metadata.geometry().cluster_size();
    const unsigned order = metadata.header().refcount_order;
    const std::uint64_t most = format::max_refcount(order);
    const auto& references = *diagnosis.references;

    // The blocks that are needed without those that count the new table and blocks.
    std::vector<std::uint64_t> indices;
    for (std::uint64_t cluster = 0; cluster < references.clusters();) {
        cluster = references.next_used(cluster, references.clusters());
        if (cluster == references.clusters()) break;
        indices.push_back(cluster / per_block);
        cluster = (cluster / per_block + 1) * per_block;
    }
    // What is new is counted in the blocks from here on: look for the number at which they count themselves, too.
    const std::uint64_t first_index = added.first() / per_block;
    std::erase_if(indices, [&](std::uint64_t index) { return index >= first_index; });
    std::uint64_t blocks = 0;
    std::uint64_t table_clusters = 0;
    for (std::uint64_t total = 0; total != blocks + table_clusters || total == 0;) {
        total = blocks + table_clusters;
        const std::uint64_t entries = divide_up(added.end() + total, per_block);
        blocks = indices.size() + (entries > first_index ? entries - first_index : 0);
        table_clusters = std::max<std::uint64_t>(1, divide_up(entries * 8, cluster_size));
    }
    if (table_clusters * cluster_size > format::max_refcount_table_bytes)
        return fail(Errc::limit_exceeded, metadata.file().name(), "its refcount table would be larger than 8 MiB");
    for (std::uint64_t index = first_index; indices.size() < blocks; ++index) indices.push_back(index);

    const auto table = TRY(added.allocate(table_clusters));
    added.refer(table, table_clusters, 1);
    std::vector<HostOffset> places;
    for (std::uint64_t i = 0; i < blocks; ++i) {
        places.push_back(TRY(added.allocate(1)));
        added.refer(places.back(), 1, 1);
    }
    const BlockCounts counts(references, added);
    std::vector<std::byte> table_bytes(table_clusters * cluster_size);
    std::vector<std::byte> block(cluster_size);
    for (std::uint64_t i = 0; i < blocks; ++i) {
        const std::uint64_t first = indices[i] * per_block;
        std::ranges::fill(block, std::byte{0});
        counts.each(first, first + per_block, [&](std::uint64_t cluster, std::uint64_t count) {
            if (count != 0) format::set_refcount(block, cluster - first, order, std::min(count, most));
        });
        TRY_VOID(file.write(places[i], block));
        store_be(table_bytes, indices[i] * 8, places[i].value);
    }
    TRY_VOID(file.write(table, table_bytes));
    return NewRefcounts{table, static_cast<std::uint32_t>(table_clusters)};
}

}  // namespace qcow::qcow2
