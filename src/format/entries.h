#pragma once
// L1 and L2 entries: what a 64-bit word of a mapping table means.
// Source: the qcow2 specification, "Cluster mapping" and "Extended L2 entries".

#include <cstdint>
#include <optional>
#include <string_view>

#include "format/geometry.h"
#include "qcow/offset.h"

namespace qcow::format {

inline constexpr std::uint64_t offset_mask = 0x00ff'ffff'ffff'fe00;       // bits 9 to 55
inline constexpr std::uint64_t max_host_offset = std::uint64_t{1} << 56;  // what an entry can express
inline constexpr std::uint64_t copied_bit = std::uint64_t{1} << 63;
inline constexpr std::uint64_t compressed_bit = std::uint64_t{1} << 62;
inline constexpr std::uint64_t zero_bit = 1;

struct L1Entry {
    std::uint64_t word = 0;

    [[nodiscard]] HostOffset l2_table() const { return {word & offset_mask}; }
    [[nodiscard]] bool allocated() const { return (word & offset_mask) != 0; }
    [[nodiscard]] bool copied() const { return (word & copied_bit) != 0; }
    [[nodiscard]] bool reserved_bits_set() const { return (word & ~(offset_mask | copied_bit)) != 0; }
};

/// Where a compressed cluster's stream lies. Its last sector may hold bytes of other streams, or end with the file.
struct CompressedRange {
    HostOffset offset;         // not aligned
    std::uint64_t length = 0;  // bytes available
    friend bool operator==(const CompressedRange&, const CompressedRange&) = default;
};

/// The five things that a guest cluster can be. With extended L2 entries `unallocated` and `data` are told apart
/// subcluster by subcluster, by the bitmap.
enum class ClusterKind : std::uint8_t {
    unallocated,     // look in the backing file
    zero,            // reads as zeros, no host cluster
    zero_allocated,  // reads as zeros, keeps a host cluster
    data,
    compressed,
};

/// The bits of an entry that say where a stream begins; the others say how long it is.
constexpr unsigned compressed_offset_bits(unsigned cluster_bits) { return 62 - (cluster_bits - 8); }

/// The word of an entry for such a range, which must begin where compressed_offset_bits() reach; its length is rounded
/// up to whole sectors.
constexpr std::uint64_t compressed_word(const CompressedRange& range, unsigned cluster_bits) {
    const unsigned offset_bits = compressed_offset_bits(cluster_bits);
    const std::uint64_t more_sectors = (range.offset.value + range.length - 1) / 512 - range.offset.value / 512;
    return compressed_bit | more_sectors << offset_bits | range.offset.value;
}

struct L2Entry {
    std::uint64_t word = 0;
    std::uint64_t bitmap = 0;  // extended entries: bits 0-31 allocated, 32-63 reads as zeros
    friend bool operator==(const L2Entry&, const L2Entry&) = default;

    [[nodiscard]] bool compressed() const { return (word & compressed_bit) != 0; }
    [[nodiscard]] bool copied() const { return (word & copied_bit) != 0; }

    /// The host cluster of an entry that is not compressed; 0: none, unless the data file is external and COPIED is
    /// set.
    [[nodiscard]] HostOffset cluster() const { return {word & offset_mask}; }

    /// The stream of a compressed entry.
    [[nodiscard]] CompressedRange compressed_range(unsigned cluster_bits) const {
        const unsigned offset_bits = compressed_offset_bits(cluster_bits);
        const std::uint64_t offset = word & low_bits(offset_bits);
        const std::uint64_t more_sectors = (word & low_bits(62)) >> offset_bits;
        return {{offset}, (more_sectors + 1) * 512 - offset % 512};
    }
};

/// The bits of subclusters [first, end) in a half of an extended entry's bitmap; end <= 32.
constexpr std::uint64_t subcluster_mask(std::uint64_t first, std::uint64_t end) {
    return low_bits(static_cast<unsigned>(end)) & ~low_bits(static_cast<unsigned>(first));
}

/// What subclusters [index, index + count) of an extended entry are, all alike.
struct SubclusterRun {
    ClusterKind kind = ClusterKind::unallocated;
    unsigned count = 0;
};

struct EntryFlaw {
    enum class Kind : std::uint8_t { contradiction, misaligned, misplaced, copied_flag, reserved_bits };
    Kind kind = Kind::contradiction;
    std::string_view what;
    bool unreadable = false;  // where the data lies can no longer be told; else reading can go on
};

/// How an image's entries are to be read: what depends on its header.
struct EntryRules {
    Geometry geometry;
    unsigned version = 3;
    bool external_data = false;

    /// What the entry's subcluster `index` is (0 without extended L2 entries), and how many from there on are alike.
    [[nodiscard]] SubclusterRun run(L2Entry entry, unsigned index) const;

    /// Whether an entry that is not compressed has a host cluster.
    [[nodiscard]] bool has_cluster(L2Entry entry) const {
        return entry.cluster().value != 0 || (external_data && entry.copied());
    }

    /// Returns what contradicts the specification in the entry of the guest cluster at `cluster`; nothing if it is well
    /// formed.
    [[nodiscard]] std::optional<EntryFlaw> flaw(L2Entry entry, GuestOffset cluster) const;
};

}  // namespace qcow::format
