// Partition tables: MBR with logical partitions, and GPT (UEFI specification, chapter 5).

#include <fmt/format.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <set>
#include <vector>

#include "base/bits.h"
#include "base/within_memory.h"
#include "filesystem/little_endian.h"
#include "filesystem/names.h"
#include "qcow/filesystem.h"

namespace qcow {
namespace {

constexpr std::uint64_t mbr_sector = 512;
constexpr unsigned most_logical = 256;
constexpr std::uint32_t most_gpt_entries = 1024;
constexpr std::uint8_t protective = 0xee;

using Bytes = std::vector<std::byte>;

/// Bytes of the disk, with zeros behind its end.
Result<Bytes> read_at(Disk& disk, std::uint64_t at, std::size_t length) {
    Bytes bytes(length);
    if (at < disk.size())
        TRY_VOID(disk.read({at}, std::span(bytes).first(std::min<std::uint64_t>(length, disk.size() - at))));
    return bytes;
}

// ---- MBR ----

struct MbrEntry {
    std::uint8_t flag = 0;
    std::uint8_t type = 0;
    std::uint32_t start = 0;  // sectors
    std::uint32_t count = 0;
};

std::array<MbrEntry, 4> entries_of(std::span<const std::byte> sector) {
    std::array<MbrEntry, 4> entries;
    for (std::size_t i = 0; i < entries.size(); ++i) {
        const auto raw = sector.subspan(446 + i * 16, 16);
        entries[i] = {static_cast<std::uint8_t>(raw[0]), static_cast<std::uint8_t>(raw[4]),
                      load_le<std::uint32_t>(raw, 8), load_le<std::uint32_t>(raw, 12)};
    }
    return entries;
}

bool is_signed(std::span<const std::byte> sector) {
    return sector[510] == std::byte{0x55} && sector[511] == std::byte{0xaa};
}

bool is_extended(std::uint8_t type) { return type == 0x05 || type == 0x0f || type == 0x85; }
bool is_used(const MbrEntry& entry) { return entry.type != 0 && entry.count != 0; }

Partition partition_of(const MbrEntry& entry, unsigned number, std::uint64_t base, std::uint32_t disk_id,
                       std::uint64_t sector_bytes) {
    Partition partition;
    partition.number = number;
    partition.start = {(base + entry.start) * sector_bytes};
    partition.bytes = std::uint64_t{entry.count} * sector_bytes;
    partition.type = fmt::format("0x{:02x}", entry.type);
    partition.type_name = mbr_type_name(entry.type);
    partition.uuid = fmt::format("{:08x}-{:02x}", disk_id, number);
    partition.bootable = entry.flag == 0x80;
    partition.extended = is_extended(entry.type);
    return partition;
}

/// Follows the chain of extended boot records. Each describes a logical partition, and names the next.
Result<void> add_logical(Disk& disk, std::uint64_t first, std::uint32_t disk_id, PartitionTable& table) {
    std::set<std::uint64_t> seen;
    unsigned number = 5;
    for (std::optional<std::uint64_t> at = first; at;) {
        if (!seen.insert(*at).second) {
            table.warnings.emplace_back("the chain of logical partitions is a loop");
            return {};
        }
        if (seen.size() > most_logical) {
            table.warnings.push_back(fmt::format("more than {} logical partitions are not shown", most_logical));
            return {};
        }
        const auto sector = TRY(read_at(disk, *at * table.sector_bytes, mbr_sector));
        if (!is_signed(sector)) {
            table.warnings.push_back(
                fmt::format("the boot record of a logical partition at sector {} is damaged", *at));
            return {};
        }
        std::optional<std::uint64_t> next;
        for (const auto& entry : entries_of(sector)) {
            if (!is_used(entry)) continue;
            if (!is_extended(entry.type)) {
                table.partitions.push_back(partition_of(entry, number++, *at, disk_id, table.sector_bytes));
            } else if (!next) {
                next = first + entry.start;
            }
        }
        at = next;
    }
    return {};
}

Result<void> read_mbr(Disk& disk, std::span<const std::byte> sector, unsigned sector_bytes, PartitionTable& table) {
    table.kind = PartitionTable::Kind::mbr;
    table.sector_bytes = sector_bytes;
    const auto disk_id = load_le<std::uint32_t>(sector, 440);
    table.uuid = fmt::format("0x{:08x}", disk_id);
    const auto entries = entries_of(sector);
    for (unsigned i = 0; i < entries.size(); ++i)
        if (is_used(entries[i])) table.partitions.push_back(partition_of(entries[i], i + 1, 0, disk_id, sector_bytes));
    for (const auto& entry : entries)
        if (is_used(entry) && is_extended(entry.type)) return add_logical(disk, entry.start, disk_id, table);
    return {};
}

/// Whether the table of a signed sector is one: boot sectors of file systems are signed, too.
bool is_plausible(const std::array<MbrEntry, 4>& entries) {
    return std::ranges::all_of(entries, [](const auto& entry) { return entry.flag == 0 || entry.flag == 0x80; }) &&
           std::ranges::any_of(entries, is_used);
}

// ---- GPT ----

std::uint32_t crc(std::span<const std::byte> bytes) {
    return static_cast<std::uint32_t>(
        ::crc32(0, reinterpret_cast<const Bytef*>(bytes.data()), static_cast<uInt>(bytes.size())));
}

struct Gpt {
    [[nodiscard]] std::span<const std::byte> header() const { return header_bytes; }
    Bytes header_bytes;
    Bytes entries;
    std::uint32_t entry_bytes = 0;
    std::uint32_t count = 0;
};

/// The table whose header lies in sector `lba`, if header and entries are valid.
Result<std::optional<Gpt>> read_gpt(Disk& disk, std::uint64_t lba, std::uint64_t sector_bytes) {
    Gpt gpt;
    if (lba > disk.size() / sector_bytes) return std::nullopt;
    gpt.header_bytes = TRY(read_at(disk, lba * sector_bytes, sector_bytes));
    const std::span<std::byte> header = gpt.header_bytes;
    if (!std::ranges::equal(header.first(8), as_bytes("EFI PART"))) return std::nullopt;
    const auto header_size = load_le<std::uint32_t>(header, 12);
    if (header_size < 92 || header_size > sector_bytes) return std::nullopt;
    const auto expected = load_le<std::uint32_t>(header, 16);
    auto copy = gpt.header_bytes;
    std::fill_n(copy.begin() + 16, 4, std::byte{0});
    if (crc(std::span(copy).first(header_size)) != expected) return std::nullopt;
    if (load_le<std::uint64_t>(header, 24) != lba) return std::nullopt;
    gpt.count = load_le<std::uint32_t>(header, 80);
    gpt.entry_bytes = load_le<std::uint32_t>(header, 84);
    if (gpt.entry_bytes < 128 || gpt.entry_bytes > 4096 || gpt.entry_bytes % 8 != 0 || gpt.count > most_gpt_entries)
        return std::nullopt;
    const auto first = load_le<std::uint64_t>(header, 72);
    const std::uint64_t length = std::uint64_t{gpt.entry_bytes} * gpt.count;
    if (first > disk.size() / sector_bytes || !lies_within(first * sector_bytes, length, disk.size()))
        return std::nullopt;
    gpt.entries = TRY(read_at(disk, first * sector_bytes, length));
    if (crc(gpt.entries) != load_le<std::uint32_t>(header, 88)) return std::nullopt;
    return gpt;
}

void take_gpt(const Gpt& gpt, std::uint64_t sector_bytes, PartitionTable& table) {
    table.kind = PartitionTable::Kind::gpt;
    table.sector_bytes = static_cast<unsigned>(sector_bytes);
    table.uuid = guid_text(gpt.header().subspan(56, 16));
    for (std::uint32_t i = 0; i < gpt.count; ++i) {
        const auto raw = std::span(gpt.entries).subspan(std::size_t{i} * gpt.entry_bytes, gpt.entry_bytes);
        if (is_zero(raw.first(16))) continue;
        const auto first = load_le<std::uint64_t>(raw, 32);
        const auto last = load_le<std::uint64_t>(raw, 40);
        const auto attributes = load_le<std::uint64_t>(raw, 48);
        Partition partition;
        partition.number = i + 1;
        constexpr std::uint64_t most = bit(63);
        if (first > last || last >= most / sector_bytes) {
            table.warnings.push_back(fmt::format("partition {} ends before it begins, or past any disk", i + 1));
            continue;
        }
        partition.start = {first * sector_bytes};
        partition.bytes = (last - first + 1) * sector_bytes;
        partition.type = guid_text(raw.first(16));
        partition.type_name = gpt_type_name(partition.type);
        partition.uuid = guid_text(raw.subspan(16, 16));
        partition.name = utf16_text(raw.subspan(56, 72));
        partition.bootable = (attributes & 4) != 0;
        table.partitions.push_back(std::move(partition));
    }
}

/// Looks for the primary table, then for the backup in the last sector, with both sizes of sectors.
Result<bool> find_gpt(Disk& disk, PartitionTable& table) {
    for (const std::uint64_t sector_bytes : {512U, 4096U}) {
        if (const auto gpt = TRY(read_gpt(disk, 1, sector_bytes))) {
            take_gpt(*gpt, sector_bytes, table);
            const auto backup = load_le<std::uint64_t>(gpt->header(), 32);
            if (!TRY(read_gpt(disk, backup, sector_bytes)))
                table.warnings.emplace_back("the backup of the partition table is damaged or missing");
            return true;
        }
    }
    for (const std::uint64_t sector_bytes : {512U, 4096U}) {
        if (disk.size() < 2 * sector_bytes) continue;
        if (const auto gpt = TRY(read_gpt(disk, disk.size() / sector_bytes - 1, sector_bytes))) {
            take_gpt(*gpt, sector_bytes, table);
            table.warnings.emplace_back("the partition table is damaged, and was read from its backup");
            return true;
        }
    }
    return false;
}

/// The name that blkid has for the table of partitions that a partition holds; empty: it holds none.
Result<std::string> nested_table(Disk& part) {
    const auto sector = TRY(read_at(part, 0, mbr_sector));
    const auto entries = entries_of(sector);
    if (!is_signed(sector) || !is_plausible(entries)) return std::string();
    return std::string(std::ranges::any_of(entries, [](const auto& e) { return e.type == protective; }) ? "gpt"
                                                                                                        : "dos");
}

Result<void> identify_parts(Disk& disk, PartitionTable& table) {
    const std::shared_ptr<Disk> borrowed(std::shared_ptr<void>(), &disk);
    for (auto& partition : table.partitions) {
        if (!lies_within(partition.start.value, partition.bytes, disk.size()))
            table.warnings.push_back(fmt::format("partition {} reaches past the end of the disk", partition.number));
        if (partition.extended || partition.start.value >= disk.size()) continue;
        const auto part =
            TRY(window(borrowed, {partition.start, std::min(partition.bytes, disk.size() - partition.start.value)}));
        partition.content = TRY(identify(*part));
        if (partition.content.type.empty()) partition.content.type = TRY(nested_table(*part));
    }
    return {};
}

/// An MBR does not say how long its sectors are. They have 512 bytes, unless nothing is known in any partition then,
/// and something with 4096.
Result<PartitionTable> listed_mbr(Disk& disk, std::span<const std::byte> sector, const Content& content) {
    const auto read = [&](unsigned sector_bytes) -> Result<PartitionTable> {
        PartitionTable table;
        table.content = content;
        TRY_VOID(read_mbr(disk, sector, sector_bytes, table));
        TRY_VOID(identify_parts(disk, table));
        return table;
    };
    const auto is_known = [](const Partition& partition) { return !partition.content.type.empty(); };
    auto usual = TRY(read(512));
    if (std::ranges::any_of(usual.partitions, is_known)) return usual;
    auto large = TRY(read(4096));
    return std::ranges::any_of(large.partitions, is_known) ? large : usual;
}

Result<PartitionTable> listed(Disk& disk) {
    PartitionTable table;
    const auto sector = TRY(read_at(disk, 0, mbr_sector));
    const auto entries = entries_of(sector);
    const bool announced =
        is_signed(sector) && std::ranges::any_of(entries, [](const auto& entry) { return entry.type == protective; });
    if (announced) {
        table.hybrid = std::ranges::any_of(entries, [](const auto& e) { return is_used(e) && e.type != protective; });
        if (!TRY(find_gpt(disk, table)))
            return fail(Errc::corrupt, "partition table", "the disk has a GPT, but neither it nor its backup is valid");
        if (auto content = TRY(identify(disk)); content.type == "iso9660") table.content = std::move(content);
    } else {
        table.content = TRY(identify(disk));
        const auto& type = table.content.type;
        const bool boot_sector = type == "vfat" || type == "ntfs" || type == "exfat" || type == "BitLocker";
        if (is_signed(sector) && !boot_sector && is_plausible(entries)) return listed_mbr(disk, sector, table.content);
    }
    TRY_VOID(identify_parts(disk, table));
    return table;
}

}  // namespace

Result<PartitionTable> list_partitions(Disk& disk) {
    return within_memory([&] { return listed(disk); });
}

}  // namespace qcow
