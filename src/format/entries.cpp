#include "format/entries.h"

#include <algorithm>
#include <bit>

namespace qcow::format {
namespace {

/// How many bits of `map`, from `index` up to 31, are the same as the one at `index`.
unsigned alike(std::uint32_t map, unsigned index) {
    const std::uint32_t rest = map >> index;
    const auto count = static_cast<unsigned>((rest & 1) != 0 ? std::countr_one(rest) : std::countr_zero(rest));
    return std::min(count, 32 - index);
}

}  // namespace

SubclusterRun EntryRules::run(L2Entry entry, unsigned index) const {
    const unsigned whole = geometry.extended_l2 ? 32 - index : 1;
    if (entry.compressed()) return {ClusterKind::compressed, whole};
    if (!geometry.extended_l2) {
        if (version >= 3 && (entry.word & zero_bit) != 0) {
            return {has_cluster(entry) ? ClusterKind::zero_allocated : ClusterKind::zero, 1};
        }
        return {has_cluster(entry) ? ClusterKind::data : ClusterKind::unallocated, 1};
    }
    const auto allocated = static_cast<std::uint32_t>(entry.bitmap);
    const auto zero = static_cast<std::uint32_t>(entry.bitmap >> 32);
    const unsigned count = std::min(alike(allocated, index), alike(zero, index));
    if ((zero >> index & 1) != 0) return {has_cluster(entry) ? ClusterKind::zero_allocated : ClusterKind::zero, count};
    if ((allocated >> index & 1) != 0) return {ClusterKind::data, count};
    return {ClusterKind::unallocated, count};
}

std::optional<EntryFlaw> EntryRules::flaw(L2Entry entry, GuestOffset cluster) const {
    using Kind = EntryFlaw::Kind;
    const auto unreadable = [](std::string_view what, Kind kind = Kind::contradiction) {
        return EntryFlaw{kind, what, true};
    };
    if (entry.compressed()) {
        if (external_data) return unreadable("compressed, which an external data file excludes");
        if (entry.copied()) return EntryFlaw{Kind::copied_flag, "compressed and COPIED at once"};
        if (entry.bitmap != 0)
            return EntryFlaw{Kind::contradiction, "compressed with a subcluster bitmap that is not zero"};
        return std::nullopt;
    }
    if (!is_aligned(entry.cluster().value, geometry.cluster_size())) {
        return unreadable("its host offset is not a multiple of the cluster size", Kind::misaligned);
    }
    if (external_data && has_cluster(entry) && entry.cluster().value != cluster.value)
        return unreadable("it does not lie where the guest's cluster lies in the data file", Kind::misplaced);
    if (version < 3 && (entry.word & zero_bit) != 0)
        return unreadable("marked as zeros, which version 2 does not have");
    if (geometry.extended_l2) {
        const auto allocated = static_cast<std::uint32_t>(entry.bitmap);
        const auto zero = static_cast<std::uint32_t>(entry.bitmap >> 32);
        if ((allocated & zero) != 0) return unreadable("a subcluster is both allocated and zero");
        if (allocated != 0 && !has_cluster(entry))
            return unreadable("subclusters are allocated, but there is no host cluster");
    }
    if (entry.copied() && !has_cluster(entry))
        return EntryFlaw{Kind::copied_flag, "COPIED, but there is no host cluster"};
    const std::uint64_t meaningful = offset_mask | copied_bit | (geometry.extended_l2 ? 0 : zero_bit);
    if ((entry.word & ~meaningful) != 0) return EntryFlaw{Kind::reserved_bits, "reserved bits are set"};
    return std::nullopt;
}

}  // namespace qcow::format
