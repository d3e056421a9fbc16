#pragma once
// GPT and MBR.

#include <string>
#include <vector>

#include "build/planned_disk.h"
#include "qcow/build.h"

namespace qcow {

/// A partition with its place, in bytes.
struct PlacedPartition {
    std::string name;  // UTF-8
    PartitionType type;
    Uuid uuid = {};
    bool bootable = false;
    std::uint64_t start = 0;
    std::uint64_t size = 0;
};

/// What a table takes at both ends of a disk, in bytes: of the start with the first sector.
struct TableRoom {
    std::uint64_t start = 0;
    std::uint64_t end = 0;
};
TableRoom room_of_table(BuildSpec::Table table, unsigned sector_size);

/// The code at the front of the first sector has at most this many bytes.
inline constexpr std::size_t boot_code_bytes = 440;

/// Writes the table, GPT with its backup. Errors: Errc::invalid_argument for what the table has no room for.
Result<void> write_partition_table(PlannedDisk& disk, BuildSpec::Table table, unsigned sector_size, const Uuid& disk_id,
                                   const std::vector<PlacedPartition>& partitions,
                                   std::span<const std::byte> boot_code);

}  // namespace qcow
