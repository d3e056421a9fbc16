#pragma once
// The numbers that follow from a header: how guest offsets divide into L1 index, L2 index and offset in the cluster.

#include <cstdint>

#include "base/bits.h"
#include "format/header.h"

namespace qcow::format {

struct Geometry {
    unsigned cluster_bits = 16;
    bool extended_l2 = false;

    Geometry() = default;
    explicit Geometry(const Header& h) : cluster_bits(h.cluster_bits), extended_l2(h.has(incompatible::extended_l2)) {}

    [[nodiscard]] std::uint64_t cluster_size() const { return bit(cluster_bits); }
    [[nodiscard]] std::uint64_t offset_in_cluster(std::uint64_t offset) const {
        return offset & low_bits(cluster_bits);
    }
    [[nodiscard]] std::uint64_t clusters(std::uint64_t bytes) const { return divide_up(bytes, cluster_size()); }

    /// Subclusters: 1/32 of a cluster with extended L2 entries, else the cluster itself.
    [[nodiscard]] unsigned subcluster_bits() const { return extended_l2 ? cluster_bits - 5 : cluster_bits; }

    /// 64-bit words that an L2 entry has.
    [[nodiscard]] unsigned entry_words() const { return extended_l2 ? 2 : 1; }
    [[nodiscard]] unsigned l2_bits() const { return cluster_bits - (extended_l2 ? 4 : 3); }
    [[nodiscard]] std::uint64_t l2_entries() const { return bit(l2_bits()); }
    /// Guest bytes that one L2 table maps.
    [[nodiscard]] std::uint64_t l2_coverage() const { return bit(l2_bits() + cluster_bits); }

    [[nodiscard]] std::uint64_t l1_index(GuestOffset at) const { return at.value >> (l2_bits() + cluster_bits); }
    [[nodiscard]] std::uint64_t l2_index(GuestOffset at) const {
        return (at.value >> cluster_bits) & low_bits(l2_bits());
    }
};

}  // namespace qcow::format
