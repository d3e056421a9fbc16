#pragma once
// From guest offset to host offset, through one L1 table: the active one or a snapshot's.

#include <cstdint>
#include <optional>
#include <span>

#include "qcow2/metadata/metadata.h"

namespace qcow::qcow2 {

/// A run of guest bytes that one L2 table maps alike.
struct Mapped {
    format::ClusterKind kind = format::ClusterKind::unallocated;
    bool copied = false;                      // the host clusters are this mapping's alone
    std::uint64_t length = 0;                 // bytes
    HostOffset host = {};                     // data and zero_allocated: of the first byte, the others behind it
    format::CompressedRange compressed = {};  // compressed: of the first cluster; the run may have several
};

/// What an entry without flaw maps from `at` on, to the end of its cluster at most.
Mapped decode(const format::EntryRules& rules, format::L2Entry entry, GuestOffset at);

/// Thread safety: all functions may be called from any number of threads. Keeps nothing but a reference to the
/// metadata.
class Mapping {
public:
    /// `snapshot_l1`: the host offset of a snapshot's L1 table; nothing: the active one, wherever that is.
    explicit Mapping(const Metadata& metadata, std::optional<HostOffset> snapshot_l1 = {})
        : metadata_(metadata), snapshot_l1_(snapshot_l1) {}

    /// Returns what the guest bytes from `at` on are, at most `limit` of them (> 0). `at` must be covered by the L1
    /// table. Errors: Errc::corrupt, naming entry and table, where the way there is damaged.
    [[nodiscard]] Result<Mapped> lookup(GuestOffset at, std::uint64_t limit) const;

    /// The host offset of the L1 entry that covers `at`.
    [[nodiscard]] HostOffset l1_entry_at(GuestOffset at) const {
        return (snapshot_l1_ ? *snapshot_l1_ : metadata_.active_l1()) + metadata_.geometry().l1_index(at) * 8;
    }
    [[nodiscard]] Result<format::L1Entry> l1_entry(GuestOffset at) const;

private:
    [[nodiscard]] Result<void> verify_table_is_there(HostOffset table, HostOffset l1_at) const;
    [[nodiscard]] Result<Mapped> scan(std::span<const std::uint64_t> words, GuestOffset at, HostOffset entry) const;
    [[nodiscard]] std::uint64_t count_alike(std::span<const std::uint64_t> words, format::ClusterKind kind) const;
    [[nodiscard]] Mapped scan_subclusters(std::span<const std::uint64_t> words, GuestOffset at) const;

    const Metadata& metadata_;
    std::optional<HostOffset> snapshot_l1_;
};

}  // namespace qcow::qcow2
