#include "qcow2/copy_on_write.h"

#include <algorithm>

#include "base/buffers.h"
#include "base/try.h"

namespace qcow::qcow2 {
namespace {

using format::ClusterKind;
using format::L2Entry;

constexpr std::uint64_t max_batch_bytes = 16 * MiB;  // that one change of entries is about

bool can_write_in_place(const Mapped& mapped) { return mapped.kind == ClusterKind::data && mapped.copied; }

}  // namespace

Result<void> CopyOnWrite::write(GuestOffset at, ConstBuffers from) {
    const Epochs::Guard guard(metadata_.epochs());
    while (!from.empty()) {
        const auto mapped = TRY(view_.lookup(at, from.size()));
        const std::size_t done =
            TRY(can_write_in_place(mapped) ? write_in_place(mapped, at, from) : write_and_map(at, from));
        at += done;
        from = from.subspan(done);
    }
    return {};
}

Result<std::size_t> CopyOnWrite::write_in_place(const Mapped& mapped, GuestOffset at, ConstBuffers from) {
    from = from.first(std::min<std::uint64_t>(from.size(), mapped.length));
    TRY_VOID(parts_.data.write(mapped.host, at, from));
    return from.size();
}

/// Writes what needs a change of entries, from the front, as much as one change can do. Returns how many bytes.
Result<std::size_t> CopyOnWrite::write_and_map(GuestOffset at, ConstBuffers from) {
    const std::uint64_t first = mapping_.cluster_of(at);
    const std::uint64_t most = std::max<std::uint64_t>(max_batch_bytes >> rules_.geometry.cluster_bits, 1);
    const std::uint64_t end =
        std::min({mapping_.page_end(first), first + most, rules_.geometry.clusters(at.value + from.size())});
    const auto guard = mapping_.lock({first, end});

    const auto entries = TRY(mapping_.load({first, end}));
    Part part{first, entries, at, from};
    if (!mapping_.needs_new_cluster(entries.front())) {
        // Another request may have given it the place meanwhile.
        const auto mapped = decode(rules_, entries.front(), at);
        if (can_write_in_place(mapped)) return write_in_place(mapped, at, from);
        part.old = part.old.first(1);
        part.from = from.first(std::min<std::uint64_t>(from.size(), mapped.length));
        return write_into_own(part);
    }
    const auto last = std::ranges::find_if(entries, [&](L2Entry entry) { return !mapping_.needs_new_cluster(entry); });
    part.old = part.old.first(static_cast<std::size_t>(last - entries.begin()));
    return write_into_new(part);
}

/// Gives the clusters new places.
Result<std::size_t> CopyOnWrite::write_into_new(Part part) {
    const auto& geometry = rules_.geometry;
    const bool fresh_zeros = parts_.data.fresh_bytes_are_zeros();
    Change change(metadata_);
    ClusterRun run{part.first, part.old.size()};  // in an external data file a guest cluster has its place
    if (!rules_.external_data) run = TRY(change.take(part.first, part.old.size()));
    part.old = part.old.first(run.count);
    const std::uint64_t bytes = mapping_.offset_of(part.first + run.count) - part.at;
    part.from = part.from.first(std::min<std::uint64_t>(part.from.size(), bytes));

    // Subclusters (or clusters) that are written to, and those of the old place that have to move with them.
    const std::uint64_t unit = bit(geometry.subcluster_bits());
    GuestOffset begin{align_down(part.at.value, unit)};
    GuestOffset end{align_down(part.end().value + unit - 1, unit)};
    const auto moves_whole = [&](L2Entry entry) {
        return !geometry.extended_l2 || entry.compressed() || rules_.has_cluster(entry);
    };
    if (moves_whole(part.old.front())) begin = mapping_.offset_of(part.first);
    if (moves_whole(part.old.back())) end = mapping_.offset_of(part.first + run.count);
    if (rules_.external_data) end = std::max(part.end(), std::min(end, GuestOffset{mapping_.disk_size()}));

    const HostOffset host = HostOffset{run.first << geometry.cluster_bits} + geometry.offset_in_cluster(begin.value);
    const bool zeros_before = TRY(reads_as_zeros(begin, end, part.first, part.old));
    // Nothing but what the guest gave has to be written where zeros are asked for and there.
    TRY_VOID(zeros_before&& fresh_zeros ? parts_.data.write(host + (part.at - begin), part.at, part.from)
                                        : write_filled(part, host, begin, end));
    // Where the guest saw something, its place may show through only once the data are durable.
    TRY_VOID(mapping_.replace(change, part.first, part.old, new_entries(part, run),
                              zeros_before && fresh_zeros ? Barrier::none : Barrier::flush));
    return part.from.size();
}

/// What the entries become when the clusters lie in `run` and the guest's bytes are written.
std::vector<L2Entry> CopyOnWrite::new_entries(const Part& part, ClusterRun run) const {
    const auto& geometry = rules_.geometry;
    const std::uint64_t unit = bit(geometry.subcluster_bits());
    std::vector<L2Entry> entries(part.old.size());
    for (std::size_t i = 0; i < entries.size(); ++i) {
        const auto& old = part.old[i];
        entries[i].word = (run.first + i) << geometry.cluster_bits | format::copied_bit;
        if (!geometry.extended_l2) continue;
        const GuestOffset cluster = mapping_.offset_of(part.first + i);
        const auto first = (std::max(part.at, cluster) - cluster) / unit;
        const auto last = divide_up(std::min(part.end(), cluster + geometry.cluster_size()) - cluster, unit);
        // Of what moved, zeros stay zeros and holes stay holes.
        const std::uint64_t touched = format::subcluster_mask(first, last);
        const std::uint64_t moved = (old.compressed() ? ~std::uint64_t{0} : old.bitmap) & low_bits(32);
        const std::uint64_t zeros = old.compressed() ? 0 : old.bitmap & ~low_bits(32) & ~(touched << 32);
        entries[i].bitmap = touched | moved | zeros;
    }
    return entries;
}

/// Writes to one cluster that has a place of its own, where the guest sees nothing of it yet.
Result<std::size_t> CopyOnWrite::write_into_own(Part part) {
    const auto& geometry = rules_.geometry;
    const std::uint64_t unit = bit(geometry.subcluster_bits());
    const auto& old = part.old.front();
    const GuestOffset begin{align_down(part.at.value, unit)};
    GuestOffset end{align_down(part.end().value + unit - 1, unit)};
    if (rules_.external_data) end = std::max(part.end(), std::min(end, GuestOffset{mapping_.disk_size()}));
    const HostOffset host = old.cluster() + geometry.offset_in_cluster(begin.value);
    TRY_VOID(write_filled(part, host, begin, end));
    L2Entry entry = old;
    if (geometry.extended_l2) {
        const GuestOffset start = mapping_.offset_of(part.first);
        const std::uint64_t touched = format::subcluster_mask((begin - start) / unit, divide_up(end - start, unit));
        entry.bitmap = (old.bitmap | touched) & ~(touched << 32);
    } else {
        entry.word &= ~format::zero_bit;
    }
    // What the place held before must not show.
    Change change(metadata_);
    TRY_VOID(mapping_.replace(change, part.first, part.old, {&entry, 1}, Barrier::flush));
    return part.from.size();
}

/// Writes guest bytes [begin, end) to `host`: those of the request, and around them what the guest sees there now.
Result<void> CopyOnWrite::write_filled(const Part& part, HostOffset host, GuestOffset begin, GuestOffset end) {
    if (begin == part.at && end == part.end()) return parts_.data.write(host, begin, part.from);
    std::vector<std::byte> old((part.at - begin) + (end - part.end()));
    const auto before = std::span(old).first(part.at - begin);
    const auto behind = std::span(old).subspan(before.size());
    TRY_VOID(read_old(part, begin, before));
    TRY_VOID(read_old(part, part.end(), behind));
    std::vector<std::span<const std::byte>> pieces{before};
    for (const auto piece : part.from) pieces.push_back(piece);
    pieces.emplace_back(behind);
    return parts_.data.write(host, begin, ConstBuffers(pieces));
}

/// Reads what the guest sees now; zeros past the end of the disk.
Result<void> CopyOnWrite::read_old(const Part& part, GuestOffset at, Buffers to) const {
    const std::uint64_t size = mapping_.disk_size();
    const std::size_t there = at.value >= size ? 0 : std::min<std::uint64_t>(to.size(), size - at.value);
    fill_zeros(to.subspan(there));
    for (to = to.first(there); !to.empty();) {
        const auto mapped = decode(rules_, part.old[mapping_.cluster_of(at) - part.first], at);
        const auto piece = to.first(std::min<std::uint64_t>(to.size(), mapped.length));
        TRY_VOID(view_.read_mapped(mapped, at, piece));
        at += piece.size();
        to = to.subspan(piece.size());
    }
    return {};
}

Result<bool> CopyOnWrite::reads_as_zeros(GuestOffset at, GuestOffset end, std::uint64_t first,
                                         std::span<const L2Entry> entries) const {
    end = std::min(end, GuestOffset{mapping_.disk_size()});
    GuestOffset hole = at;  // from here on nothing is stored
    while (at < end) {
        const auto mapped = decode(rules_, entries[mapping_.cluster_of(at) - first], at);
        if (mapped.kind == ClusterKind::data || mapped.kind == ClusterKind::compressed) return false;
        const GuestOffset next = std::min(end, at + mapped.length);
        if (mapped.kind != ClusterKind::unallocated) {
            if (!TRY(backing_is_zeros(hole, at))) return false;
            hole = next;
        }
        at = next;
    }
    return backing_is_zeros(hole, end);
}

Result<bool> CopyOnWrite::backing_is_zeros(GuestOffset at, GuestOffset end) const {
    end = std::min(end, GuestOffset{mapping_.disk_size()});
    while (at < end) {
        const auto extent = TRY(parts_.backing.extent(at, end - at));
        if (extent.kind == Extent::Kind::data) return false;
        at += extent.length;
    }
    return true;
}

}  // namespace qcow::qcow2
