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

/// Less than a cluster: subclusters by the entry, where there are any; the rest is written.
Result<void> Writer::zero_part(GuestOffset at, std::uint64_t length, Zeroing zeroing) {
    if (TRY(reads_as_zeros(at, length))) return {};
    const std::uint64_t unit = bit(rules_.geometry.subcluster_bits());
    const GuestOffset begin{align_down(at.value + unit - 1, unit)};
    const GuestOffset end{align_down(at.value + length, unit)};
    if (!rules_.geometry.extended_l2 || begin >= end) return write_zero_bytes(at, length);
    TRY_VOID(write_zero_bytes(at, begin - at));
    if (!TRY(zero_subclusters(begin, end, zeroing))) TRY_VOID(write_zero_bytes(begin, end - begin));
    return write_zero_bytes(end, at + length - end);
}

/// [begin, end) are subclusters of one cluster. False: the entry cannot say it.
Result<bool> Writer::zero_subclusters(GuestOffset begin, GuestOffset end, Zeroing zeroing) {
    const std::uint64_t cluster = begin.value >> cluster_bits_;
    const std::uint64_t unit = bit(rules_.geometry.subcluster_bits());
    const RangeLocks::Guard guard(clusters_, cluster, cluster + 1);
    const auto old = TRY(load_entries({cluster, cluster + 1}));
    const std::uint64_t mask =
        format::subcluster_mask((begin - cluster_at(cluster)) / unit, (end - cluster_at(cluster)) / unit);
    const auto entry = TRY(zeroed(cluster, old.front(), mask, zeroing));
    if (!entry) return false;
    TRY_VOID(store_entries(cluster, {&*entry, 1}, false));
    if (rules_.external_data) TRY_VOID(core_->data->write_zeroes({begin.value}, end - begin));
    return true;
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

/// What an entry becomes when these subclusters (bits; 1 without subclusters) of its are zeroed. Nothing: it cannot say
/// so.
Result<std::optional<L2Entry>> Writer::zeroed(std::uint64_t cluster, L2Entry old, std::uint64_t subclusters,
                                              Zeroing zeroing) {
    const bool extended = rules_.geometry.extended_l2;
    const std::uint64_t all = extended ? low_bits(32) : 1;
    const bool own_place = !needs_new_cluster(old);
    // A raw data file is read by others, who see places and not entries: it keeps its mapping.
    const bool keeps_place = own_place && (zeroing == Zeroing::keep || subclusters != all || raw_data_);
    if (subclusters != all && !own_place && (old.compressed() || rules_.has_cluster(old))) return std::nullopt;
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
    // What is discarded needs no mark where there is nothing below.
    const bool marks = zeroing != Zeroing::discard || keeps_place || core_->below.exists();
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
    // A disk is mostly holes: a table that is not there need not be made to say so.
    if (!TRY(l1_entry(begin)).allocated() && TRY(reads_as_zeros(begin, cluster_at(clusters.end) - begin))) {
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
        changes |= next->word != entry.word || next->bitmap != entry.bitmap;
        entries.push_back(*next);
    }
    if (entries.empty()) return 0;
    if (changes) TRY_VOID(store_entries(clusters.first, entries, false));
    for (std::size_t i = 0; i < entries.size(); ++i) {
        if (rules_.has_cluster(entries[i])) old[i] = {};
    }
    retire(std::span(old).first(entries.size()));
    // In an external file the place is fixed, so there is no other moment for this; nobody else maps it meanwhile.
    if (rules_.external_data) TRY_VOID(core_->data->write_zeroes({begin.value}, entries.size() << cluster_bits_));
    return entries.size();
}

}  // namespace qcow::qcow2
