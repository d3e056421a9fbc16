#include "qcow2/mapping.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/try.h"
#include "disk/range.h"

namespace qcow::qcow2 {
namespace {

using format::ClusterKind;
using format::L2Entry;

constexpr std::size_t max_words = 512;  // a page of the cache

std::unexpected<Error> damaged(const Metadata& metadata, std::string place, std::string_view what) {
    return fail(Errc::corrupt, fmt::format("{}: {}", metadata.file().name(), place), std::string(what));
}

std::string l1_place(HostOffset at) { return fmt::format("L1 entry at host offset {:#x}", at.value); }

/// How many entries are equal to the first one.
std::uint64_t count_equal(std::span<const std::uint64_t> words, std::size_t entry_words) {
    const auto first = words.first(entry_words);
    std::size_t end = entry_words;
    while (end < words.size() && std::ranges::equal(words.subspan(end, entry_words), first)) end += entry_words;
    return end / entry_words;
}

/// By how much a word grows from one cluster of a contiguous run to the next.
std::uint64_t stride(ClusterKind kind, std::uint64_t cluster_size) {
    return kind == ClusterKind::data || kind == ClusterKind::zero_allocated ? cluster_size : 0;
}

}  // namespace

Mapped decode(const format::EntryRules& rules, L2Entry entry, GuestOffset at) {
    const auto& geometry = rules.geometry;
    const std::uint64_t skip = geometry.offset_in_cluster(at.value);
    Mapped mapped;
    mapped.copied = entry.copied();
    if (entry.compressed()) {
        mapped.kind = ClusterKind::compressed;
        mapped.length = geometry.cluster_size() - skip;
        mapped.compressed = entry.compressed_range(geometry.cluster_bits);
        return mapped;
    }
    const std::uint64_t unit = bit(geometry.subcluster_bits());
    const auto run = rules.run(entry, static_cast<unsigned>(skip / unit));
    mapped.kind = run.kind;
    mapped.length = run.count * unit - skip % unit;
    mapped.host = entry.cluster() + skip;
    return mapped;
}

Result<format::L1Entry> Mapping::l1_entry(GuestOffset at) const {
    const HostOffset l1_at = l1_entry_at(at);
    const format::L1Entry l1{TRY(metadata_.words().load(l1_at))};
    // Zeros are also what lies past the end of the file.
    if (l1.word == 0 && !metadata_.l1_left_out() && !TRY(metadata_.is_in_file(l1_at, 8)))
        return damaged(metadata_, l1_place(l1_at), metadata_.past_the_end(metadata_.file(), "the L1 table", l1_at));
    if (is_aligned(l1.l2_table().value, metadata_.geometry().cluster_size())) return l1;
    return damaged(
        metadata_, l1_place(l1_at),
        fmt::format("the L2 table's offset {:#x} is not a multiple of the cluster size", l1.l2_table().value));
}

Result<void> Mapping::verify_table_is_there(HostOffset table, HostOffset l1_at) const {
    const std::uint64_t bytes = metadata_.geometry().cluster_size();
    if (TRY(metadata_.is_in_file(table, bytes))) return {};
    return damaged(metadata_, l1_place(l1_at),
                   metadata_.past_the_end(metadata_.file(), "the end of the L2 table", table + bytes));
}

Result<Mapped> Mapping::lookup(GuestOffset at, std::uint64_t limit) const {
    const auto& geometry = metadata_.geometry();
    const std::uint64_t rest_of_table = geometry.l2_coverage() - (at.value & (geometry.l2_coverage() - 1));
    auto l1 = l1_entry(at);
    if (!l1) return unreadable(std::move(l1).error(), at, std::min(limit, rest_of_table));
    if (!l1->allocated()) return Mapped{.length = std::min(limit, rest_of_table)};
    const HostOffset table = l1->l2_table();

    const std::uint64_t index = geometry.l2_index(at);
    const unsigned entry_words = geometry.entry_words();
    const HostOffset entry_at = table + index * entry_words * 8;
    const std::uint64_t wanted =
        std::min(geometry.clusters(geometry.offset_in_cluster(at.value) + std::min(limit, geometry.l2_coverage())),
                 geometry.l2_entries() - index);
    std::array<std::uint64_t, max_words> buffer;
    const auto wanted_words = std::min<std::uint64_t>(wanted * entry_words, max_words);
    const auto loaded = metadata_.words().load(entry_at, std::span(buffer).first(wanted_words));
    // Of these entries, which begin with the one of `at`.
    const auto bytes_of = [&](std::uint64_t entries) {
        return std::min(limit, entries * geometry.cluster_size() - geometry.offset_in_cluster(at.value));
    };
    if (!loaded) {
        const std::uint64_t rest_of_sector = sector_bytes - entry_at.value % sector_bytes;
        return unreadable(loaded.error(), at, bytes_of(rest_of_sector / 8 / entry_words));
    }
    const auto words = std::span<const std::uint64_t>(buffer).first(*loaded);
    // Zeros are also what lies past the end of the file: there, no table can be.
    if (words[0] == 0) {
        if (auto there = verify_table_is_there(table, l1_entry_at(at)); !there)
            return unreadable(std::move(there).error(), at, bytes_of(count_equal(words, entry_words)));
    }
    auto mapped = scan(words, at, entry_at);
    if (!mapped) {
        // An entry of an external data file is right at one guest cluster only, so an equal one may not be damaged.
        const std::uint64_t entries = metadata_.rules().external_data ? 1 : count_equal(words, entry_words);
        return unreadable(std::move(mapped).error(), at, bytes_of(entries));
    }
    mapped->length = std::min(mapped->length, limit);
    // What a shared table leads to is shared, too, whatever its entries say.
    mapped->copied &= l1->copied();
    return mapped;
}

Result<Mapped> Mapping::scan(std::span<const std::uint64_t> words, GuestOffset at, HostOffset entry_at) const {
    const auto& rules = metadata_.rules();
    const auto& geometry = rules.geometry;
    const L2Entry first{words[0], geometry.extended_l2 ? words[1] : 0};
    const GuestOffset cluster{align_down(at.value, geometry.cluster_size())};
    if (const auto flaw = rules.flaw(first, cluster); flaw && flaw->unreadable) {
        return damaged(metadata_,
                       fmt::format("L2 entry at host offset {:#x} (guest offset {:#x})", entry_at.value, at.value),
                       flaw->what);
    }
    if (geometry.extended_l2 && !first.compressed()) return scan_subclusters(words, at);
    auto mapped = decode(rules, first, at);
    mapped.length += (count_alike(words, mapped.kind) - 1) * geometry.cluster_size();
    return mapped;
}

/// How many entries go on as the first one does. Comparing whole words also finds that they are as well formed as it
/// is.
std::uint64_t Mapping::count_alike(std::span<const std::uint64_t> words, ClusterKind kind) const {
    const auto& geometry = metadata_.geometry();
    const unsigned step = geometry.entry_words();
    std::uint64_t count = 1;
    if (kind == ClusterKind::compressed) {
        while (count * step < words.size() && L2Entry{words[count * step]}.compressed()) ++count;
        return count;
    }
    const std::uint64_t grows = stride(kind, geometry.cluster_size());
    std::uint64_t expected = words[0] + grows;
    for (; count < words.size() && words[count] == expected; expected += grows) ++count;
    return count;
}

Mapped Mapping::scan_subclusters(std::span<const std::uint64_t> words, GuestOffset at) const {
    const auto& rules = metadata_.rules();
    const auto& geometry = rules.geometry;
    const std::uint64_t subcluster_size = bit(geometry.subcluster_bits());
    const std::uint64_t skip = geometry.offset_in_cluster(at.value);
    auto index = static_cast<unsigned>(skip / subcluster_size);

    auto mapped = decode(rules, {words[0], words[1]}, at);
    const std::uint64_t grows = stride(mapped.kind, geometry.cluster_size());
    std::uint64_t cluster = L2Entry{words[0]}.cluster().value;
    GuestOffset guest{at.value - skip};
    std::uint64_t subclusters = 0;
    for (std::size_t i = 0; i + 1 < words.size();
         i += 2, index = 0, cluster += grows, guest += geometry.cluster_size()) {
        const L2Entry entry{words[i], words[i + 1]};
        if (i != 0 && (entry.compressed() || rules.flaw(entry, guest) || entry.copied() != mapped.copied ||
                       (grows != 0 && entry.cluster().value != cluster)))
            break;
        // A word of zeros may lie past the end of the file: lookup() sees to those that it begins with.
        if (entry.word == 0 && words[0] != 0) break;
        const auto run = rules.run(entry, index);
        if (run.kind != mapped.kind) break;
        subclusters += run.count;
        if (index + run.count < 32) break;
    }
    mapped.length = subclusters * subcluster_size - skip % subcluster_size;
    return mapped;
}

}  // namespace qcow::qcow2
