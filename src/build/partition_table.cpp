#include "build/partition_table.h"

#include <zlib.h>

#include <algorithm>
#include <array>

#include "base/bits.h"
#include "filesystem/little_endian.h"
#include "filesystem/names.h"

namespace qcow {
namespace {

constexpr std::uint64_t gpt_entries = 128;
constexpr std::uint64_t gpt_entry_bytes = 128;
constexpr std::uint64_t gpt_header_bytes = 92;
constexpr std::size_t gpt_name_units = 36;
constexpr std::size_t mbr_entries = 4;
constexpr std::uint8_t protective = 0xee;

std::uint32_t crc(std::span<const std::byte> bytes) {
    return static_cast<std::uint32_t>(
        crc32(0, reinterpret_cast<const Bytef*>(bytes.data()), static_cast<uInt>(bytes.size())));
}

/// GPT stores the first three fields of a GUID as little-endian numbers.
void store_guid(std::span<std::byte> to, std::size_t at, const Uuid& uuid) {
    constexpr std::array<std::uint8_t, 16> order = {3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15};
    for (std::size_t i = 0; i < uuid.size(); ++i) to[at + i] = std::byte{uuid[order[i]]};
}

/// Cylinder, head and sector of a block, as those who still read them expect: 255 heads and 63 sectors.
void store_chs(std::span<std::byte> to, std::size_t at, std::uint64_t block) {
    constexpr std::uint64_t heads = 255;
    constexpr std::uint64_t sectors = 63;
    auto cylinder = block / (heads * sectors);
    auto head = block / sectors % heads;
    auto sector = block % sectors + 1;
    if (cylinder > 1023) cylinder = 1023, head = heads - 1, sector = sectors;
    to[at] = static_cast<std::byte>(head);
    to[at + 1] = static_cast<std::byte>(sector | (cylinder >> 2 & 0xc0));
    to[at + 2] = static_cast<std::byte>(cylinder);
}

void store_mbr_entry(std::span<std::byte> sector, std::size_t index, std::uint8_t type, bool active,
                     std::uint64_t first, std::uint64_t count) {
    const auto at = 446 + index * 16;
    sector[at] = active ? std::byte{0x80} : std::byte{0};
    store_chs(sector, at + 1, first);
    sector[at + 4] = std::byte{type};
    store_chs(sector, at + 5, first + count - 1);
    store_le(sector, at + 8, static_cast<std::uint32_t>(first));
    store_le(sector, at + 12, static_cast<std::uint32_t>(count));
}

class TableWriter {
public:
    TableWriter(PlannedDisk& disk, unsigned sector_size, const Uuid& disk_id,
                const std::vector<PlacedPartition>& partitions)
        : disk_(disk),
          sector_(sector_size),
          sectors_(disk.size() / sector_size),
          id_(disk_id),
          partitions_(partitions) {}

    Result<void> write_mbr(std::span<const std::byte> code) {
        auto sector = first_sector(code);
        for (unsigned i = 0; i < 4; ++i) sector[440 + i] = std::byte{id_[i]};
        for (std::size_t i = 0; i < partitions_.size(); ++i) {
            const auto& partition = partitions_[i];
            const auto first = partition.start / sector_;
            const auto count = partition.size / sector_;
            store_mbr_entry(sector, i, *partition.type.mbr, partition.bootable, first, count);
        }
        return disk_.write({0}, sector);
    }

    Result<void> write_gpt(std::span<const std::byte> code) {
        auto sector = first_sector(code);
        const auto covered = std::min<std::uint64_t>(sectors_ - 1, 0xffffffff);
        store_mbr_entry(sector, 0, protective, false, 1, covered);
        TRY_VOID(disk_.write({0}, sector));

        std::vector<std::byte> entries(gpt_entries * gpt_entry_bytes);
        for (std::size_t i = 0; i < partitions_.size(); ++i) {
            const auto& partition = partitions_[i];
            const auto entry = std::span(entries).subspan(i * gpt_entry_bytes, gpt_entry_bytes);
            store_guid(entry, 0, *partition.type.guid);
            store_guid(entry, 16, partition.uuid);
            store_le(entry, 32, partition.start / sector_);
            store_le(entry, 40, (partition.start + partition.size) / sector_ - 1);
            store_le(entry, 48, std::uint64_t{partition.bootable ? 4U : 0U});
            const auto name = utf16(partition.name).value_or(u"");
            for (std::size_t k = 0; k < name.size(); ++k) store_le(entry, 56 + 2 * k, std::uint16_t{name[k]});
        }
        const auto blocks = divide_up(entries.size(), sector_);
        const auto last = sectors_ - 1;
        TRY_VOID(disk_.write({2 * sector_}, entries));
        TRY_VOID(disk_.write({(last - blocks) * sector_}, entries));
        TRY_VOID(write_header(1, last, 2, entries));
        return write_header(last, 1, last - blocks, entries);
    }

private:
    [[nodiscard]] std::vector<std::byte> first_sector(std::span<const std::byte> code) const {
        std::vector<std::byte> sector(sector_);
        std::ranges::copy(code, sector.begin());
        store_le<std::uint16_t>(sector, 510, 0xaa55);
        return sector;
    }

    Result<void> write_header(std::uint64_t own, std::uint64_t other, std::uint64_t entries_at,
                              std::span<const std::byte> entries) {
        const auto blocks = divide_up(entries.size(), sector_);
        std::vector<std::byte> header(sector_);
        std::ranges::copy(as_bytes("EFI PART"), header.begin());
        store_le<std::uint32_t>(header, 8, 0x00010000);
        store_le(header, 12, static_cast<std::uint32_t>(gpt_header_bytes));
        store_le(header, 24, own);
        store_le(header, 32, other);
        store_le(header, 40, 2 + blocks);             // the first sector for partitions
        store_le(header, 48, sectors_ - 2 - blocks);  // the last one
        store_guid(header, 56, id_);
        store_le(header, 72, entries_at);
        store_le(header, 80, static_cast<std::uint32_t>(gpt_entries));
        store_le(header, 84, static_cast<std::uint32_t>(gpt_entry_bytes));
        store_le(header, 88, crc(entries));
        store_le(header, 16, crc(std::span(header).first(gpt_header_bytes)));
        return disk_.write({own * sector_}, header);
    }

    PlannedDisk& disk_;
    std::uint64_t sector_;
    std::uint64_t sectors_;
    const Uuid& id_;
    const std::vector<PlacedPartition>& partitions_;
};

}  // namespace

TableRoom room_of_table(BuildSpec::Table table, unsigned sector_size) {
    if (table == BuildSpec::Table::none) return {};
    if (table == BuildSpec::Table::mbr) return {sector_size, 0, std::uint64_t{0xffffffff} * sector_size};
    const auto entries = divide_up(gpt_entries * gpt_entry_bytes, sector_size) * sector_size;
    return {std::uint64_t{2} * sector_size + entries, sector_size + entries};
}

std::size_t most_partitions(BuildSpec::Table table) {
    return table == BuildSpec::Table::mbr ? mbr_entries : gpt_entries;
}

bool is_name_in_gpt(std::string_view name) {
    const auto stored = utf16(name);
    return stored && stored->size() <= gpt_name_units;
}

Result<void> write_partition_table(PlannedDisk& disk, BuildSpec::Table table, unsigned sector_size, const Uuid& disk_id,
                                   const std::vector<PlacedPartition>& partitions,
                                   std::span<const std::byte> boot_code) {
    TableWriter writer(disk, sector_size, disk_id, partitions);
    return table == BuildSpec::Table::mbr ? writer.write_mbr(boot_code) : writer.write_gpt(boot_code);
}

}  // namespace qcow
