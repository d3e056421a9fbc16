// Changes of the mapping that a killed process had made in its cache.

#include <fmt/format.h>

#include <map>
#include <vector>

#include "base/try.h"
#include "qcow2/metadata/writable_metadata.h"

namespace qcow::qcow2 {
namespace {

/// What became of a word.
struct ChangedWord {
    std::uint64_t after = 0;
    bool known = false;  // the image has a value of the word that the log tells of
};

/// Rebuilding refcounts, which may have come between, changes the mark of entries that nobody else refers to.
bool alike(std::uint64_t a, std::uint64_t b) { return ((a ^ b) & ~format::copied_bit) == 0; }

/// The clusters of the image file that an entry of the mapping at `at` refers to; none: its count is 0.
ClusterRun referenced(const Metadata& metadata, HostOffset at, format::L2Entry entry) {
    const auto& rules = metadata.rules();
    const unsigned bits = rules.geometry.cluster_bits;
    const auto state = metadata.state();
    if (at >= state.l1_table && at < state.l1_table + std::uint64_t{state.l1_entries} * 8)
        return {entry.cluster().value >> bits, entry.cluster().value == 0 ? 0U : 1U};
    if (rules.geometry.entry_words() == 2 && at.value / 8 % 2 != 0) return {};  // its bitmap
    if (entry.compressed()) {
        const auto range = entry.compressed_range(bits);
        return clusters_of(range.offset, range.length, bits);
    }
    if (rules.external_data || !rules.has_cluster(entry)) return {};
    return {entry.cluster().value >> bits, 1};
}

}  // namespace

Result<void> WritableMetadata::redo(std::span<const RedoLog::Store> stores, bool recounted) {
    std::map<HostOffset, ChangedWord> words;
    for (const auto& store : stores) {
        const std::uint64_t found = TRY(metadata_.words().load(store.at));
        const auto [word, is_first] = words.try_emplace(store.at);
        word->second.after = store.after;
        // Pages may have been written at any time in between.
        word->second.known |= (is_first && alike(found, store.before)) || alike(found, store.after);
    }
    const bool has_dirty_mark = metadata_.header().version >= 3;
    const auto refuse = [&](HostOffset at) {
        return fail(Errc::invalid_argument, metadata_.file().name(),
                    fmt::format("it was changed after the process that used it was killed (at host offset {:#x}), so "
                                "what its guest wrote last, and did not flush, is lost; restart the guest",
                                at.value));
    };
    std::vector<ClusterRun> streams;
    for (const auto& [at, word] : words) {
        // What the process had in its cache has a place in the file, and the header is not among it.
        const bool is_place = at.value >= metadata_.cluster_size() && TRY(metadata_.is_in_file(at, 8));
        if (!word.known || !is_place) return refuse(at);
        const format::L2Entry entry{word.after};
        auto clusters = referenced(metadata_, at, entry);
        // Without that mark, somebody could believe the refcounts before they are counted again.
        if (!has_dirty_mark && entry.compressed() && clusters.count != 0) streams.push_back(clusters);
        // Clusters are counted before they are handed out. Who has found that nothing refers to them has freed them.
        for (std::uint64_t count = 0; clusters.count > 0 && !recounted; ++clusters.first, --clusters.count) {
            TRY_VOID(load_refcounts({clusters.first, 1}, {&count, 1}));
            if (count == 0) return refuse(at);
        }
    }
    if (has_dirty_mark)
        TRY_VOID(change_header([](format::HeaderState& state) { state.incompatible |= format::incompatible::dirty; }));
    TRY_VOID(add_references(streams));
    for (const auto& [at, word] : words) TRY_VOID(write_back_.store(at, {&word.after, 1}, mapping_pages, true));
    TRY_VOID(write_changes());
    return map_.load(metadata_);
}

}  // namespace qcow::qcow2
