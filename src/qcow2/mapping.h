#pragma once
// From guest offset to host offset, through one L1 table: the active one or a snapshot's.

#include <atomic>
#include <cstdint>
#include <span>

#include "qcow2/core.h"

namespace qcow::qcow2 {

/// A run of guest bytes that one L2 table maps alike.
struct Mapped {
    format::ClusterKind kind = format::ClusterKind::unallocated;
    bool copied = false;                      // the host clusters are this mapping's alone
    std::uint64_t length = 0;                 // bytes
    HostOffset host = {};                     // data and zero_allocated: of the first byte, the others behind it
    format::CompressedRange compressed = {};  // compressed: of the first cluster; the run may have several
};

/// Thread-safe; keeps nothing but a reference to the core.
class Mapping {
public:
    Mapping(const Core& core, HostOffset l1_table) : core_(&core), l1_table_(l1_table.value) {}

    /// What the guest bytes from `at` on are, at most `limit` of them (> 0). `at` must be covered by the L1 table.
    /// Errc::corrupt, naming entry and table, where the way there is damaged.
    [[nodiscard]] Result<Mapped> lookup(GuestOffset at, std::uint64_t limit) const;

    /// The word of the L1 table that covers `at`, and where it lies.
    [[nodiscard]] HostOffset l1_entry_at(GuestOffset at) const {
        return HostOffset{l1_table_.load(std::memory_order_acquire)} + core_->rules.geometry.l1_index(at) * 8;
    }
    [[nodiscard]] Result<format::L1Entry> l1_entry(GuestOffset at) const;

    /// A copy of the table, with more entries, has become the table.
    void move_l1(HostOffset l1_table) { l1_table_.store(l1_table.value, std::memory_order_release); }

private:
    [[nodiscard]] Result<bool> is_in_file(HostOffset at, std::uint64_t bytes) const;
    [[nodiscard]] Result<void> verify_table_is_there(HostOffset table, HostOffset l1_at) const;
    [[nodiscard]] Result<Mapped> scan(std::span<const std::uint64_t> words, GuestOffset at, HostOffset entry) const;
    [[nodiscard]] std::uint64_t count_alike(std::span<const std::uint64_t> words, format::ClusterKind kind) const;
    [[nodiscard]] Mapped scan_subclusters(std::span<const std::uint64_t> words, GuestOffset at) const;

    const Core* core_;
    std::atomic<std::uint64_t> l1_table_;
};

}  // namespace qcow::qcow2
