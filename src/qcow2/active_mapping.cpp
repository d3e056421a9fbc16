#include "qcow2/active_mapping.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "base/endian.h"
#include "base/invariant.h"
#include "base/try.h"
#include "qcow2/metadata/directories.h"

namespace qcow::qcow2 {

using format::L2Entry;

namespace {

constexpr std::size_t page_words = 512;

}  // namespace

std::uint64_t ActiveMapping::table_end(std::uint64_t cluster) const {
    const std::uint64_t entries = rules_.geometry.l2_entries();
    return (cluster / entries + 1) * entries;
}

std::uint64_t ActiveMapping::page_end(std::uint64_t cluster) const {
    const std::uint64_t entries = metadata_.metadata().words().page_bytes() / 8 / rules_.geometry.entry_words();
    return (cluster / entries + 1) * entries;
}

Result<format::L1Entry> ActiveMapping::l1_entry(GuestOffset at) {
    auto entry = mapping_.l1_entry(at);
    if (!entry && entry.error().code == Errc::corrupt) return metadata_.declare_corrupt(std::move(entry).error());
    return entry;
}

Result<std::vector<L2Entry>> ActiveMapping::load(GuestClusters clusters) {
    std::vector<L2Entry> entries(clusters.count());
    const GuestOffset at = offset_of(clusters.first);
    const auto l1 = TRY(l1_entry(at));
    if (!l1.allocated()) return entries;
    const unsigned entry_words = rules_.geometry.entry_words();
    HostOffset host = l1.l2_table() + rules_.geometry.l2_index(at) * entry_words * 8;
    std::array<std::uint64_t, page_words> words;
    for (std::size_t i = 0; i < entries.size();) {
        const auto loaded = TRY(metadata_.metadata().words().load(
            host, std::span(words).first(std::min<std::uint64_t>(words.size(), (entries.size() - i) * entry_words))));
        for (std::size_t k = 0; k < loaded; k += entry_words)
            entries[i++] = {words[k], entry_words == 2 ? words[k + 1] : 0};
        host += loaded * 8;
    }
    for (std::size_t i = 0; i < entries.size(); ++i) {
        const GuestOffset cluster = offset_of(clusters.first + i);
        // What a shared table leads to is shared, too, whatever its entries say.
        if (!l1.copied() && !entries[i].compressed()) entries[i].word &= ~format::copied_bit;
        if (const auto flaw = rules_.flaw(entries[i], cluster); flaw && flaw->unreadable) {
            return metadata_.declare_corrupt(fmt::format("L2 entry of guest offset {:#x}", cluster.value),
                                             std::string(flaw->what));
        }
    }
    return entries;
}

Result<void> ActiveMapping::replace(Change& change, std::uint64_t first, std::span<const L2Entry> old,
                                    std::span<const L2Entry> entries, Barrier barrier) {
    INVARIANT(entries.size() == old.size() && first + entries.size() <= page_end(first));
    const GuestOffset at = offset_of(first);
    const std::lock_guard lock(table_lock(at));
    const HostOffset table = TRY(own_table(at));
    const unsigned entry_words = rules_.geometry.entry_words();
    std::array<std::uint64_t, page_words> words;
    for (std::size_t i = 0; i < entries.size(); ++i) {
        words[i * entry_words] = entries[i].word;
        if (entry_words == 2) words[i * 2 + 1] = entries[i].bitmap;
    }
    drop(change, old, entries);
    return change.commit(table + rules_.geometry.l2_index(at) * entry_words * 8,
                         std::span(words).first(entries.size() * entry_words), barrier);
}

/// The L2 table that maps `at`, the image's alone. Under its lock.
Result<HostOffset> ActiveMapping::own_table(GuestOffset at) {
    const auto l1 = TRY(l1_entry(at));
    if (l1.allocated() && l1.copied()) return l1.l2_table();
    Change change(metadata_);
    const HostOffset table = TRY(change.take_table(MetadataMap::Kind::l2_table));
    if (l1.allocated()) {
        auto& metadata = metadata_.metadata();
        const std::uint64_t bytes = metadata.cluster_size();
        auto words = TRY(load_words(metadata, l1.l2_table(), bytes / 8));
        for (std::size_t i = 0; i < words.size(); i += rules_.geometry.entry_words()) words[i] &= ~format::copied_bit;
        TRY_VOID(metadata.file().write(table, encode_words(words, bytes)));
        change.drop_table(l1.l2_table(), bytes);
    }
    const std::uint64_t word = table.value | format::copied_bit;
    TRY_VOID(change.commit(mapping_.l1_entry_at(at), {&word, 1}, l1.allocated() ? Barrier::flush : Barrier::none));
    return table;
}

/// Of a change that replaces `old` by `entries`: the places that these do not keep.
void ActiveMapping::drop(Change& change, std::span<const L2Entry> old, std::span<const L2Entry> entries) const {
    const unsigned cluster_bits = rules_.geometry.cluster_bits;
    ClusterRun run;
    const auto finish = [&] {
        if (run.count != 0) change.drop(run);
        run = {};
    };
    for (std::size_t i = 0; i < old.size(); ++i) {
        if (old[i].compressed()) {
            change.drop_stream(old[i].compressed_range(cluster_bits));
            continue;
        }
        if (rules_.external_data || !rules_.has_cluster(old[i])) continue;
        if (!entries[i].compressed() && entries[i].cluster() == old[i].cluster()) continue;
        const std::uint64_t cluster = old[i].cluster().value >> cluster_bits;
        if (run.count != 0 && run.end() != cluster) finish();
        if (run.count++ == 0) run.first = cluster;
    }
    finish();
}

Result<void> ActiveMapping::drop_table(std::uint64_t cluster) {
    const GuestOffset at = offset_of(cluster);
    const GuestClusters clusters{cluster, table_end(cluster)};
    const auto guard = lock(clusters);
    const std::lock_guard table_guard(table_lock(at));
    const auto l1 = TRY(l1_entry(at));
    if (!l1.allocated()) return {};
    const auto old = TRY(load(clusters));
    Change change(metadata_);
    drop(change, old, std::vector<L2Entry>(old.size()));
    change.drop_table(l1.l2_table(), metadata_.metadata().cluster_size());
    constexpr std::uint64_t none = 0;
    return change.commit(mapping_.l1_entry_at(at), {&none, 1}, Barrier::none);
}

Result<std::vector<std::uint64_t>> ActiveMapping::share_tables() {
    auto& metadata = metadata_.metadata();
    const auto state = metadata.state();
    const auto old = TRY(load_words(metadata, state.l1_table, state.l1_entries));
    auto words = old;
    for (auto& word : words) word &= ~format::copied_bit;
    TRY_VOID(store_table(metadata_, state.l1_table, old, words));
    return words;
}

Result<void> ActiveMapping::correct_copied_flags() {
    const std::uint64_t entries = metadata_.metadata().state().l1_entries;
    for (std::uint64_t index = 0; index < entries; ++index) TRY_VOID(correct_copied_flags(index));
    return {};
}

/// The same for an L1 entry and the table that it leads to.
Result<void> ActiveMapping::correct_copied_flags(std::uint64_t l1_index) {
    auto& metadata = metadata_.metadata();
    const auto& geometry = rules_.geometry;
    const GuestOffset at{l1_index * geometry.l2_coverage()};
    const std::uint64_t first = cluster_of(at);
    const auto guard = lock({first, table_end(first)});
    const std::lock_guard table_guard(table_lock(at));
    const auto l1 = TRY(l1_entry(at));
    if (!l1.allocated()) return {};
    const unsigned cluster_bits = geometry.cluster_bits;
    const auto corrected = [](std::uint64_t word, std::uint64_t refcount) {
        return refcount == 1 ? word | format::copied_bit : word & ~format::copied_bit;
    };
    const unsigned step = geometry.entry_words();
    const auto host_of = [&](std::uint64_t word) {
        const L2Entry entry{word};
        return entry.compressed() ? 0 : entry.cluster().value >> cluster_bits;
    };
    const auto old = TRY(load_words(metadata, l1.l2_table(), metadata.cluster_size() / 8));
    auto words = old;
    std::array<std::uint64_t, page_words> counts;
    for (std::size_t i = 0; i < words.size();) {
        ClusterRun run{host_of(words[i]), 1};
        if (run.first == 0 || rules_.external_data) {
            i += step;
            continue;
        }
        while (run.count < counts.size() && i + run.count * step < words.size() &&
               host_of(words[i + run.count * step]) == run.end())
            ++run.count;
        TRY_VOID(metadata_.load_refcounts(run, counts));
        for (std::size_t k = 0; k < run.count; ++k, i += step) words[i] = corrected(words[i], counts[k]);
    }
    TRY_VOID(store_table(metadata_, l1.l2_table(), old, words));
    TRY_VOID(metadata_.load_refcounts({l1.l2_table().value >> cluster_bits, 1}, counts));
    const std::uint64_t word = corrected(l1.word, counts[0]);
    if (word == l1.word) return {};
    Change change(metadata_);
    return change.commit(mapping_.l1_entry_at(at), {&word, 1}, Barrier::none);
}

Result<void> ActiveMapping::grow_l1(std::uint64_t entries) {
    auto& metadata = metadata_.metadata();
    const auto state = metadata.state();
    if (entries <= state.l1_entries) return {};
    const std::uint64_t clusters = divide_up(entries * 8, metadata.cluster_size());
    Change change(metadata_);
    const HostOffset table = TRY(change.take_table(MetadataMap::Kind::l1_table, clusters));
    // Nobody may change an entry of the old table while it moves.
    std::vector<std::unique_lock<std::mutex>> locks;
    locks.reserve(table_locks_.size());
    for (auto& lock : table_locks_) locks.emplace_back(lock);
    TRY_VOID(metadata.file().write(
        table, TRY(copy_words(metadata, state.l1_table, state.l1_entries, clusters * metadata.cluster_size()))));
    // Entries that were only in the cache may refer to tables that have to be written first.
    TRY_VOID(metadata_.write_changes());
    if (state.l1_entries != 0) change.drop_table(state.l1_table, std::uint64_t{state.l1_entries} * 8);
    return change.commit_header([&](format::HeaderState& changed) {
        changed.l1_table = table;
        changed.l1_entries = static_cast<std::uint32_t>(entries);
    });
}

}  // namespace qcow::qcow2
