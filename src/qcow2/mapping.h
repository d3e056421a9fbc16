#pragma once
// From guest offset to host offset, through one L1 table: the active one or a snapshot's.

#include <cstdint>
#include <span>

#include "qcow2/core.h"

namespace qcow::qcow2 {

/// A run of guest bytes that one L2 table maps alike.
struct Mapped {
    format::ClusterKind kind = format::ClusterKind::unallocated;
    std::uint64_t length = 0;            // bytes
    HostOffset host;                     // data and zero_allocated: of the first byte, the others behind it
    format::CompressedRange compressed;  // compressed: of the first cluster; the run may have several
};

/// Thread-safe; keeps nothing but a reference to the core.
class Mapping {
public:
    Mapping(const Core& core, HostOffset l1_table) : core_(&core), l1_table_(l1_table) {}

    /// What the guest bytes from `at` on are, at most `limit` of them (> 0). `at` must be covered by the L1 table.
    /// Errc::corrupt, naming entry and table, where the way there is damaged.
    [[nodiscard]] Result<Mapped> lookup(GuestOffset at, std::uint64_t limit) const;

private:
    [[nodiscard]] Result<Mapped> scan(std::span<const std::uint64_t> words, GuestOffset at, HostOffset entry) const;
    [[nodiscard]] std::uint64_t count_alike(std::span<const std::uint64_t> words, format::ClusterKind kind) const;
    [[nodiscard]] Mapped scan_subclusters(std::span<const std::uint64_t> words, GuestOffset at) const;

    const Core* core_;
    HostOffset l1_table_;
};

}  // namespace qcow::qcow2
