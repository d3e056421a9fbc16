#pragma once
// The snapshot table and the bitmap directory: lists of entries of varying length, parsed one entry at a time.
// Source: the qcow2 specification, "Snapshots" and "Bitmaps extension".

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "qcow/error.h"
#include "qcow/image.h"
#include "qcow/offset.h"

namespace qcow::format {

/// As in QEMU. Larger tables would only cost memory.
inline constexpr std::uint64_t max_snapshot_table_bytes = std::uint64_t{64} << 20;
inline constexpr std::uint64_t max_snapshot_bytes = std::uint64_t{1} << 20;  // of an entry: names need 128 KiB
inline constexpr std::uint64_t max_bitmap_directory_bytes = std::uint64_t{16} << 20;

/// What a snapshot of version 3 has at least.
inline constexpr std::uint32_t min_snapshot_extra_bytes = 16;

struct SnapshotEntry {
    HostOffset l1_table;
    std::uint32_t l1_entries = 0;
    SnapshotInfo info;
    std::uint32_t extra_bytes = 0;
    std::size_t encoded_bytes = 0;  // with padding
};

/// The entry at the front of `in`. `disk_size` is the virtual size that entries without one of their own have.
Result<SnapshotEntry> parse_snapshot(std::span<const std::byte> in, unsigned version, std::uint64_t disk_size);

/// Returns the bytes of an entry, with the extra data that version 3 has, padded.
std::vector<std::byte> encode_snapshot(const SnapshotEntry& entry);

/// Returns the bytes of an entry that parse_snapshot() has read, with another name. Extra data stay.
std::vector<std::byte> rename_snapshot(std::span<const std::byte> encoded, std::string_view name);

struct BitmapEntry {
    /// Where the 32-bit flags lie in the encoded entry: never across two sectors, so that they can be changed in place.
    static constexpr std::size_t flags_at = 12;
    static constexpr std::size_t table_entries_at = 8;  // the same; the table's offset is the first field
    static constexpr std::uint32_t in_use_flag = 1;
    static constexpr std::uint32_t enabled_flag = 2;
    static constexpr std::uint32_t extra_data_compatible_flag = 4;

    static constexpr std::size_t fixed_bytes = 24;

    /// QEMU refuses an image with a bitmap of another granularity.
    static constexpr unsigned min_granularity_bits = 9;
    static constexpr unsigned max_granularity_bits = 31;
    static constexpr std::size_t max_name_length = 1023;

    /// Returns the bytes of an entry with so many bytes of name and extra data.
    static constexpr std::size_t encoded_size(std::size_t name, std::size_t extra_data) {
        return (fixed_bytes + extra_data + name + 7) / 8 * 8;
    }

    HostOffset table;
    std::uint32_t table_entries = 0;
    std::uint32_t flags = 0;
    unsigned granularity_bits = 0;
    std::uint32_t extra_data_bytes = 0;
    bool understood = true;  // false: it has extra data, and must not be used by those who do not know what they mean
    BitmapInfo info;
    std::size_t encoded_bytes = 0;

    /// Returns why QEMU refuses an image with this bitmap; empty: it does not.
    [[nodiscard]] std::string_view refusal() const;
    /// Returns the entry without extra data, if these may be ignored.
    [[nodiscard]] BitmapEntry without_ignorable_data() const;
};

Result<BitmapEntry> parse_bitmap(std::span<const std::byte> in);

/// Returns the bytes of an entry without extra data.
std::vector<std::byte> encode_bitmap(const BitmapEntry& entry);

/// An entry of a bitmap's table: a cluster of bits, or all zeros or all ones.
struct BitmapTableEntry {
    std::uint64_t word = 0;
    [[nodiscard]] HostOffset cluster() const { return {word & 0x00ff'ffff'ffff'fe00}; }
    [[nodiscard]] bool all_ones() const { return cluster().value == 0 && (word & 1) != 0; }
    [[nodiscard]] bool reserved_bits_set() const {
        const std::uint64_t meaningful = cluster().value != 0 ? 0x00ff'ffff'ffff'fe00 : 1;
        return (word & ~meaningful) != 0;
    }
};

}  // namespace qcow::format
