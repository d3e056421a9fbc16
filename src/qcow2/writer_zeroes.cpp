// The writer's zeros: entries where they can say it, bytes where they cannot.

#include <algorithm>

#include "base/try.h"
#include "qcow2/writer.h"

namespace qcow::qcow2 {
namespace {

using format::L2Entry;

constexpr std::uint64_t piece_bytes = 1 * GiB;  // at least, after which it is seen to what was retired

}  // namespace

Result<void> Writer::write_zeroes(GuestOffset at, std::uint64_t length, Disk::Zeroes zeroes) {
    return write_back_.attempt([&]() -> Result<void> {
        return zero_request(at, length, zeroes == Disk::Zeroes::keep ? Zeroing::keep : Zeroing::release);
    });
}

Result<void> Writer::discard(GuestOffset at, std::uint64_t length) {
    if (!options_.discard) return {};
    const std::uint64_t size = size_.load();
    const GuestOffset begin{align_down(at.value + low_bits(cluster_bits_), bit(cluster_bits_))};
    const GuestOffset end{at.value + length == size ? size : align_down(at.value + length, bit(cluster_bits_))};
    if (begin >= end) return {};
    return write_back_.attempt([&] { return zero_request(begin, end - begin, Zeroing::discard); });
}

/// In pieces, for a scattered disk retires as many runs as it has clusters.
Result<void> Writer::zero_request(GuestOffset at, std::uint64_t length, Zeroing zeroing) {
    TRY_VOID(begin_writing(at, length));
    const std::uint64_t piece = std::max(piece_bytes, rules_.geometry.l2_coverage());
    while (length > 0) {
        const auto part = std::min(length, piece - at.value % piece);
        TRY_VOID(zero_range(at, part, zeroing));
        TRY_VOID(flush_if_full());
        at += part;
        length -= part;
    }
    return finish_request();
}

/// Whole clusters by their entries, table by table; the last cluster of the disk counts as whole.
Result<void> Writer::zero_range(GuestOffset at, std::uint64_t length, Zeroing zeroing) {
    const Epochs::Guard guard(epochs_);
    const std::uint64_t size = size_.load();
    const GuestOffset end = at + length;
    const std::uint64_t whole_end =
        end.value >= size ? rules_.geometry.clusters(end.value) : end.value >> cluster_bits_;
    while (at < end) {
        const std::uint64_t cluster = at.value >> cluster_bits_;
        const GuestOffset part_end = std::min(end, cluster_at(cluster + 1));
        if (at != cluster_at(cluster) || cluster >= whole_end) {
            TRY_VOID(zero_part(at, part_end - at, zeroing));
            at = part_end;
            continue;
        }
        const std::uint64_t done = TRY(zero_clusters({cluster, std::min(whole_end, l2_end(at))}, zeroing));
        if (done == 0) {
            // The format cannot say it. A discard may then be ignored.
            if (zeroing != Zeroing::discard) TRY_VOID(write_zero_bytes(at, part_end - at));
            at = part_end;
        } else {
            at = cluster_at(cluster + done);
        }
    }
    return {};
}

/// Less than a cluster: by the entry where it can say it; the rest is written.
Result<void> Writer::zero_part(GuestOffset at, std::uint64_t length, Zeroing zeroing) {
    if ((rules_.version < 3 || zeroing == Zeroing::forget) && TRY(reads_as_zeros(at, length))) return {};
    const GuestOffset end = at + length;
    const auto [marked, marked_end] = TRY(zero_units(at, length, zeroing));
    if (marked > at) TRY_VOID(write_zero_bytes(at, marked - at));
    return marked_end < end ? write_zero_bytes(marked_end, end - marked_end) : Result<void>();
}

/// Marks units of one cluster (subclusters, where there are any) as zeros: those that lie in the range, and those that
/// lie there in part and are zeros otherwise. Gives where they begin and end; an empty range at the end where there are
/// none.
Result<std::pair<GuestOffset, GuestOffset>> Writer::zero_units(GuestOffset at, std::uint64_t length, Zeroing zeroing) {
    const GuestOffset end = at + length;
    const std::pair none{end, end};
    if (rules_.version < 3 || raw_data_) return none;
    const std::uint64_t cluster = at.value >> cluster_bits_;
    const std::uint64_t unit = bit(rules_.geometry.subcluster_bits());
    // What is no data does not become data meanwhile.
    const RangeLocks::Guard guard(clusters_, cluster, cluster + 1);
    GuestOffset first{align_down(at.value, unit)};
    GuestOffset last{align_down(end.value + unit - 1, unit)};
    if (!TRY(reads_as_zeros(first, at - first))) first += unit;
    if (!TRY(reads_as_zeros(end, last - end))) last = {last.value - unit};
    if (first >= last) return none;
    const auto old = TRY(load_entries({cluster, cluster + 1}));
    const std::uint64_t mask =
        format::subcluster_mask((first - cluster_at(cluster)) / unit, (last - cluster_at(cluster)) / unit);
    const auto entry = TRY(zeroed(cluster, old.front(), mask, zeroing));
    if (!entry) return none;
    if (rules_.external_data) TRY_VOID(zero_data_file(first, last - first));
    if (*entry != old.front()) TRY_VOID(store_entries(cluster, {&*entry, 1}, false));
    if (!rules_.has_cluster(*entry)) retire(old);
    return std::pair{first, last};
}

Result<void> Writer::write_zero_bytes(GuestOffset at, std::uint64_t length) {
    static constexpr std::array<std::byte, 64 * KiB> zeros = {};
    while (length > 0) {
        const auto piece = std::min<std::uint64_t>(length, zeros.size() - at.value % zeros.size());
        TRY_VOID(write_mapped(at, std::span(zeros).first(piece)));
        at += piece;
        length -= piece;
    }
    return {};
}

/// In an external file the place is fixed, so there is no other moment for this; nobody else maps it meanwhile.
Result<void> Writer::zero_data_file(GuestOffset at, std::uint64_t length) {
    if (!raw_data_) return core_->data->write_zeroes({at.value}, length);
    return make_zeros(*core_->data, {at.value}, std::min(length, size_.load() - at.value));
}

/// What an entry becomes when these subclusters (bits; 1 without subclusters) of its are zeroed. Nothing: it cannot say
/// so.
Result<std::optional<L2Entry>> Writer::zeroed(std::uint64_t cluster, L2Entry old, std::uint64_t subclusters,
                                              Zeroing zeroing) {
    const bool extended = rules_.geometry.extended_l2;
    const std::uint64_t all = extended ? low_bits(32) : 1;
    const bool own_place = !needs_new_cluster(old);
    // A raw data file is read by others, who see places and not entries: it has the zeros, and every entry leads there.
    if (raw_data_) return L2Entry{cluster_at(cluster).value | format::copied_bit, extended ? all : 0};
    // A part of a cluster is marked where the cluster is, also where a snapshot shares that.
    if (subclusters != all && old.compressed()) return std::nullopt;
    const bool keeps_place = subclusters != all ? rules_.has_cluster(old) : own_place && zeroing == Zeroing::keep;
    if (rules_.version < 3) {
        // No zero flag: only where nothing shines through.
        const std::uint64_t size = size_.load();
        const std::uint64_t bytes = std::min(bit(cluster_bits_), size - cluster_at(cluster).value);
        const auto below = TRY(core_->below.extent(cluster_at(cluster), bytes));
        if (zeroing == Zeroing::keep && own_place) return std::nullopt;
        if (below.kind == Extent::Kind::data || below.length < bytes) return std::nullopt;
        return L2Entry{};
    }
    L2Entry entry;
    if (keeps_place) entry.word = old.word;
    const bool nothing_there = old == L2Entry{} && !core_->below.exists();
    const bool marks = zeroing != Zeroing::forget && !(zeroing == Zeroing::discard && nothing_there);
    if (!extended) {
        if (marks) entry.word |= format::zero_bit;
        return entry;
    }
    if (keeps_place || subclusters != all) entry.bitmap = old.bitmap & ~subclusters & ~(subclusters << 32);
    if (marks || subclusters != all) entry.bitmap |= subclusters << 32;
    return entry;
}

/// Clusters of one L2 table, from the front; gives how many it has done. 0: the entry of the first cannot say it.
Result<std::uint64_t> Writer::zero_clusters(Clusters clusters, Zeroing zeroing) {
    const GuestOffset begin = cluster_at(clusters.first);
    // A table that is not there is made only for what has to be recorded: a disk is mostly holes.
    const bool records = rules_.version >= 3 && (zeroing == Zeroing::release || zeroing == Zeroing::keep);
    if (!records && !raw_data_ && !TRY(l1_entry(begin)).allocated() &&
        TRY(reads_as_zeros(begin, cluster_at(clusters.end) - begin))) {
        return clusters.end - clusters.first;
    }
    clusters.end = std::min(clusters.end, page_end(begin));
    const RangeLocks::Guard guard(clusters_, clusters.first, clusters.end);
    auto old = TRY(load_entries(clusters));
    std::vector<L2Entry> entries;
    bool changes = false;
    for (const auto& entry : old) {
        const std::uint64_t all = rules_.geometry.extended_l2 ? low_bits(32) : 1;
        const auto next = TRY(zeroed(clusters.first + entries.size(), entry, all, zeroing));
        if (!next) break;
        changes |= *next != entry;
        entries.push_back(*next);
    }
    if (entries.empty()) return 0;
    if (rules_.external_data) TRY_VOID(zero_data_file(begin, entries.size() << cluster_bits_));
    if (changes) TRY_VOID(store_entries(clusters.first, entries, raw_data_));
    for (std::size_t i = 0; i < entries.size(); ++i) {
        if (rules_.has_cluster(entries[i])) old[i] = {};
    }
    retire(std::span(old).first(entries.size()));
    return entries.size();
}

}  // namespace qcow::qcow2
