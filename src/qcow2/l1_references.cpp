#include "qcow2/l1_references.h"

#include <algorithm>
#include <vector>

#include "base/try.h"
#include "qcow2/metadata/directories.h"

namespace qcow::qcow2 {
namespace {

using format::L2Entry;

/// The host clusters that the entries of an L2 table refer to. Those that two entries refer to are there twice.
std::vector<ClusterRun> data_of(const format::EntryRules& rules, std::span<const std::uint64_t> words) {
    const unsigned cluster_bits = rules.geometry.cluster_bits;
    std::vector<ClusterRun> runs;
    for (std::size_t i = 0; i < words.size(); i += rules.geometry.entry_words()) {
        const L2Entry entry{words[i]};
        if (entry.compressed()) {
            const auto range = entry.compressed_range(cluster_bits);
            runs.push_back(clusters_of(range.offset, range.length, cluster_bits));
            continue;
        }
        const std::uint64_t cluster = entry.cluster().value >> cluster_bits;
        if (cluster == 0) continue;
        if (!runs.empty() && runs.back().end() == cluster) {
            ++runs.back().count;
        } else {
            runs.push_back({cluster, 1});
        }
    }
    return runs;
}

Result<std::vector<std::uint64_t>> load_table(WritableMetadata& metadata, HostOffset table) {
    return load_words(metadata.metadata(), table, metadata.metadata().cluster_size() / 8);
}

/// Takes the COPIED flags off the entries of an L2 table.
Result<void> clear_flags(WritableMetadata& metadata, HostOffset table, std::span<const std::uint64_t> words) {
    const unsigned step = metadata.metadata().geometry().entry_words();
    std::vector<std::uint64_t> cleared(words.begin(), words.end());
    for (std::size_t i = 0; i < cleared.size(); i += step) cleared[i] &= ~format::copied_bit;
    return store_table(metadata, table, words, cleared);
}

HostOffset table_of(std::uint64_t l1_word) { return format::L1Entry{l1_word}.l2_table(); }

ClusterRun cluster_at(const WritableMetadata& metadata, HostOffset table) {
    return {table.value >> metadata.metadata().header().cluster_bits, 1};
}

}  // namespace

Result<void> add_references(WritableMetadata& metadata, std::span<const std::uint64_t> l1) {
    std::size_t done = 0;
    const auto attempt = [&]() -> Result<void> {
        for (; done < l1.size(); ++done) {
            const HostOffset table = table_of(l1[done]);
            if (table.value == 0) continue;
            const auto words = TRY(load_table(metadata, table));
            TRY_VOID(metadata.protect_table(table));
            TRY_VOID(clear_flags(metadata, table, words));
            auto runs = data_of(metadata.metadata().rules(), words);
            runs.push_back(cluster_at(metadata, table));
            TRY_VOID(metadata.add_references(runs));
        }
        return {};
    };
    auto added = attempt();
    // If even that fails, they are leaked.
    if (!added) static_cast<void>(remove_references(metadata, l1.first(done)));
    return added;
}

Result<void> remove_references(WritableMetadata& metadata, std::span<const std::uint64_t> l1) {
    for (const auto word : l1) {
        const HostOffset table = table_of(word);
        if (table.value == 0) continue;
        for (const auto& run : data_of(metadata.metadata().rules(), TRY(load_table(metadata, table))))
            TRY_VOID(metadata.remove_reference(run, false));
        TRY_VOID(metadata.remove_reference(cluster_at(metadata, table), true));
    }
    return {};
}

}  // namespace qcow::qcow2
