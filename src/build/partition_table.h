#pragma once
// GPT and MBR.

#include <string>
#include <string_view>
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
    std::uint64_t limit = ~std::uint64_t{0};  // no partition ends behind this byte
};
TableRoom room_of_table(BuildSpec::Table table, unsigned sector_size);

/// The most partitions that a table has.
std::size_t most_partitions(BuildSpec::Table table);

/// Whether a GPT can store the name: UTF-8 of at most 36 UTF-16 units.
bool is_name_in_gpt(std::string_view name);

/// The code at the front of the first sector has at most this many bytes.
inline constexpr std::size_t boot_code_bytes = 440;

/// Writes the table, GPT with its backup. The table has room for the partitions and their names, as above.
Result<void> write_partition_table(PlannedDisk& disk, BuildSpec::Table table, unsigned sector_size, const Uuid& disk_id,
                                   const std::vector<PlacedPartition>& partitions,
                                   std::span<const std::byte> boot_code);

}  // namespace qcow
