#include "qcow2/zeroing.h"

#include <algorithm>
#include <array>

#include "base/try.h"

namespace qcow::qcow2 {

using format::L2Entry;

/// Whole clusters by their entries, table by table.
Result<void> Zeroing::zero(GuestOffset at, std::uint64_t length, Mode mode) {
    const Epochs::Guard guard(metadata_.epochs());
    const GuestOffset end = at + length;
    const std::uint64_t whole_end =
        end.value >= mapping_.disk_size() ? rules_.geometry.clusters(end.value) : mapping_.cluster_of(end);
    while (at < end) {
        const std::uint64_t cluster = mapping_.cluster_of(at);
        const GuestOffset part_end = std::min(end, mapping_.offset_of(cluster + 1));
        if (at != mapping_.offset_of(cluster) || cluster >= whole_end) {
            TRY_VOID(zero_part(at, part_end, mode));
            at = part_end;
            continue;
        }
        const GuestClusters clusters{cluster, std::min(whole_end, mapping_.table_end(cluster))};
        const std::uint64_t done = TRY(zero_clusters(clusters, mode));
        if (done == 0) {
            // The format cannot say it. A discard may then be ignored.
            if (mode != Mode::discard) TRY_VOID(write_zero_bytes(at, part_end));
            at = part_end;
        } else {
            at = mapping_.offset_of(cluster + done);
        }
    }
    return {};
}

Result<std::uint64_t> Zeroing::expand(GuestOffset at, std::uint64_t limit) {
    const std::uint64_t first = mapping_.cluster_of(at);
    const GuestClusters clusters{first, std::min(mapping_.page_end(first), first + rules_.geometry.clusters(limit))};
    const auto end_of = [&](std::uint64_t cluster) {
        return std::min(mapping_.offset_of(cluster), GuestOffset{mapping_.disk_size()});
    };
    const auto entries = TRY(mapping_.load(clusters));
    for (std::uint64_t i = 0; i < entries.size(); ++i) {
        if (entries[i].compressed() || (entries[i].word & format::zero_bit) == 0) continue;
        const GuestOffset begin = mapping_.offset_of(first + i);
        const GuestOffset end = end_of(first + i + 1);
        const bool shines_through = !TRY(writes_.backing_is_zeros(begin, end));
        TRY_VOID(shines_through ? write_zero_bytes(begin, end) : zero(begin, end - begin, Mode::forget));
    }
    return end_of(clusters.end) - at;
}

/// Less than a cluster: by the entry where it can say it; the rest is written.
Result<void> Zeroing::zero_part(GuestOffset at, GuestOffset end, Mode mode) {
    const auto [marked, marked_end] = TRY(zero_units(at, end, mode));
    if (marked > at) TRY_VOID(write_zero_bytes(at, marked));
    return marked_end < end ? write_zero_bytes(marked_end, end) : Result<void>();
}

/// Marks units of one cluster (subclusters, where there are any) as zeros: those that lie in the range, and those that
/// lie there in part and are zeros otherwise. Returns the range that reads as zeros now; an empty one at the end where
/// there is none.
Result<std::pair<GuestOffset, GuestOffset>> Zeroing::zero_units(GuestOffset at, GuestOffset end, Mode mode) {
    const std::pair none{end, end};
    const std::uint64_t cluster = mapping_.cluster_of(at);
    const std::uint64_t unit = bit(rules_.geometry.subcluster_bits());
    // What is no data does not become data meanwhile.
    const auto guard = mapping_.lock({cluster, cluster + 1});
    const auto old = TRY(mapping_.load({cluster, cluster + 1}));
    const auto are_zeros = [&](GuestOffset from, GuestOffset to) {
        return writes_.reads_as_zeros(from, to, cluster, old);
    };
    if ((rules_.version < 3 || mode == Mode::forget) && TRY(are_zeros(at, end))) return std::pair{at, end};
    if (rules_.version < 3 || parts_.data.is_raw()) return none;
    GuestOffset first{align_down(at.value, unit)};
    GuestOffset last{align_down(end.value + unit - 1, unit)};
    if (!TRY(are_zeros(first, at))) first += unit;
    if (!TRY(are_zeros(end, last))) last = {last.value - unit};
    if (first >= last) return none;
    const GuestOffset start = mapping_.offset_of(cluster);
    const std::uint64_t mask = format::subcluster_mask((first - start) / unit, (last - start) / unit);
    const auto entry = TRY(zeroed(cluster, old.front(), mask, mode));
    if (!entry) return none;
    if (rules_.external_data) TRY_VOID(zero_data_file(first, last - first));
    if (*entry != old.front()) {
        Change change(metadata_);
        TRY_VOID(mapping_.replace(change, cluster, old, {&*entry, 1}, Barrier::none));
    }
    return std::pair{first, last};
}

Result<void> Zeroing::write_zero_bytes(GuestOffset at, GuestOffset end) {
    static constexpr std::array<std::byte, 64 * KiB> zeros = {};
    while (at < end) {
        const auto piece = std::min<std::uint64_t>(end - at, zeros.size() - at.value % zeros.size());
        TRY_VOID(writes_.write(at, std::span(zeros).first(piece)));
        at += piece;
    }
    return {};
}

/// In an external file the place is fixed, so there is no other moment for this; nobody else maps it meanwhile.
Result<void> Zeroing::zero_data_file(GuestOffset at, std::uint64_t length) {
    // Zeros decrypt to something else, which would show until the entry is durable. The place keeps what it has.
    if (parts_.data.is_encrypted()) return {};
    if (parts_.data.is_raw()) length = std::min(length, mapping_.disk_size() - at.value);
    return parts_.data.write_zeroes({at.value}, length);
}

/// Returns what an entry becomes when these subclusters (bits; 1 without subclusters) of its are zeroed. Returns
/// nothing if no entry can say so.
Result<std::optional<L2Entry>> Zeroing::zeroed(std::uint64_t cluster, L2Entry old, std::uint64_t subclusters,
                                               Mode mode) {
    const bool extended = rules_.geometry.extended_l2;
    const std::uint64_t all = all_subclusters();
    const GuestOffset at = mapping_.offset_of(cluster);
    const bool own_place = !mapping_.needs_new_cluster(old);
    // A raw data file is read by others, who see places and not entries: it has the zeros, and every entry leads there.
    if (parts_.data.is_raw()) return L2Entry{at.value | format::copied_bit, extended ? all : 0};
    // A part of a cluster is marked where the cluster is, also where a snapshot shares that.
    if (subclusters != all && old.compressed()) return std::nullopt;
    const bool keeps_place = subclusters != all ? rules_.has_cluster(old) : own_place && mode == Mode::keep;
    if (rules_.version < 3) {
        // No zero flag: only where nothing shines through.
        const std::uint64_t bytes = std::min(rules_.geometry.cluster_size(), mapping_.disk_size() - at.value);
        const auto below = TRY(parts_.backing.extent(at, bytes));
        if (mode == Mode::keep && own_place) return std::nullopt;
        if (below.kind == Extent::Kind::data || below.length < bytes) return std::nullopt;
        return L2Entry{};
    }
    L2Entry entry;
    if (keeps_place) entry.word = old.word;
    const bool nothing_there = old == L2Entry{} && !parts_.backing.exists();
    const bool marks = mode != Mode::forget && (mode != Mode::discard || !nothing_there);
    if (!extended) {
        if (marks) entry.word |= format::zero_bit;
        return entry;
    }
    if (keeps_place || subclusters != all) entry.bitmap = old.bitmap & ~subclusters & ~(subclusters << 32);
    if (marks || subclusters != all) entry.bitmap |= subclusters << 32;
    return entry;
}

/// Clusters of one L2 table, from the front. Returns how many it has done; 0: the entry of the first cannot say it.
Result<std::uint64_t> Zeroing::zero_clusters(GuestClusters clusters, Mode mode) {
    const GuestOffset begin = mapping_.offset_of(clusters.first);
    // A table that is not there is made only for what has to be recorded: a disk is mostly holes.
    const bool records = rules_.version >= 3 && (mode == Mode::release || mode == Mode::keep);
    if (!records && !parts_.data.is_raw() && !TRY(mapping_.l1_entry(begin)).allocated() &&
        TRY(writes_.backing_is_zeros(begin, mapping_.offset_of(clusters.end)))) {
        return clusters.count();
    }
    clusters.end = std::min(clusters.end, mapping_.page_end(clusters.first));
    const auto guard = mapping_.lock(clusters);
    const auto old = TRY(mapping_.load(clusters));
    std::vector<L2Entry> entries;
    bool changes = false;
    for (const auto& entry : old) {
        const auto next = TRY(zeroed(clusters.first + entries.size(), entry, all_subclusters(), mode));
        if (!next) break;
        changes |= *next != entry;
        entries.push_back(*next);
    }
    if (entries.empty()) return 0;
    if (rules_.external_data) TRY_VOID(zero_data_file(begin, entries.size() * rules_.geometry.cluster_size()));
    if (changes) {
        Change change(metadata_);
        TRY_VOID(mapping_.replace(change, clusters.first, std::span(old).first(entries.size()), entries,
                                  parts_.data.is_raw() ? Barrier::flush : Barrier::none));
    }
    return entries.size();
}

}  // namespace qcow::qcow2
