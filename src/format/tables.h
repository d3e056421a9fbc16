#pragma once
// The snapshot table and the bitmap directory: lists of entries of varying length, parsed one entry at a time.
// Source: the qcow2 specification, "Snapshots" and "Bitmaps extension".

#include <cstddef>
#include <cstdint>
#include <span>

#include "qcow/error.h"
#include "qcow/image.h"
#include "qcow/offset.h"

namespace qcow::format {

/// Larger tables do not exist in practice; opening them would only cost memory.
inline constexpr std::uint64_t max_snapshot_table_bytes = std::uint64_t{16} << 20;
inline constexpr std::uint64_t max_bitmap_directory_bytes = std::uint64_t{16} << 20;

struct SnapshotEntry {
    HostOffset l1_table;
    std::uint32_t l1_entries = 0;
    SnapshotInfo info;
    std::size_t encoded_bytes = 0;  // with padding
};

/// The entry at the front of `in`. `disk_size` is the virtual size that entries without one of their own have.
Result<SnapshotEntry> parse_snapshot(std::span<const std::byte> in, unsigned version, std::uint64_t disk_size);

struct BitmapEntry {
    HostOffset table;
    std::uint32_t table_entries = 0;
    unsigned granularity_bits = 0;
    BitmapInfo info;
    std::size_t encoded_bytes = 0;
};

Result<BitmapEntry> parse_bitmap(std::span<const std::byte> in);

/// An entry of a bitmap's table: a cluster of bits, or all zeros or all ones.
struct BitmapTableEntry {
    std::uint64_t word = 0;
    [[nodiscard]] HostOffset cluster() const { return {word & 0x00ff'ffff'ffff'fe00}; }
    [[nodiscard]] bool reserved_bits_set() const {
        const std::uint64_t meaningful = cluster().value != 0 ? 0x00ff'ffff'ffff'fe00 : 1;
        return (word & ~meaningful) != 0;
    }
};

}  // namespace qcow::format
