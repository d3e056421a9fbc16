#include "filesystem/fat_table.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <limits>

#include "filesystem/little_endian.h"

namespace qcow {
namespace {

constexpr std::uint32_t lead_signature = 0x41615252;
constexpr std::uint32_t count_signature = 0x61417272;
constexpr std::uint64_t free_count_at = 488;
constexpr std::uint64_t next_free_at = 492;
constexpr std::uint32_t not_known = 0xffffffff;

std::unexpected<Error> damaged(std::string what) { return fail(Errc::corrupt, "vfat", std::move(what)); }
std::unexpected<Error> damaged_cluster(std::uint32_t cluster, std::string_view what) {
    return damaged(fmt::format("cluster {} {}; run fsck.fat before it is changed", cluster, what));
}

}  // namespace

Result<FatVolume> read_fat_volume(Disk& disk) {
    std::vector<std::byte> boot(512);
    TRY_VOID(disk.read({0}, boot));
    const auto byte = [&](std::size_t at) { return std::to_integer<std::uint64_t>(boot[at]); };
    const auto word = [&](std::size_t at) -> std::uint64_t { return load_le<std::uint16_t>(boot, at); };
    const auto number = [&](std::size_t at) -> std::uint64_t { return load_le<std::uint32_t>(boot, at); };
    FatVolume volume;
    auto& layout = volume.layout;
    layout.sector = word(11);
    layout.cluster_sectors = byte(13);
    layout.reserved = word(14);
    layout.tables = byte(16);
    layout.root_entries = word(17);
    layout.sectors = word(19) != 0 ? word(19) : number(32);
    const bool wide = word(22) == 0;
    layout.table_sectors = wide ? number(36) : word(22);
    if (!std::has_single_bit(layout.sector) || layout.sector < 512 || layout.sector > 4096 ||
        !std::has_single_bit(layout.cluster_sectors) || layout.reserved == 0 || layout.tables == 0 ||
        layout.tables > 4 || layout.table_sectors == 0 || layout.sectors <= layout.data_start())
        return damaged("the sizes in its boot sector make no sense");
    if (layout.sectors > disk.size() / layout.sector) return damaged("the disk ends before the file system does");
    layout.clusters = (layout.sectors - layout.data_start()) / layout.cluster_sectors;
    if (layout.clusters == 0 || layout.clusters > fat::cluster_limits(32).second)
        return damaged("it has no clusters, or too many");
    layout.bits = wide ? 32 : layout.clusters <= fat::cluster_limits(12).second ? 12 : 16;
    if ((layout.clusters + fat::first_cluster) * layout.bits > layout.table_sectors * layout.sector * 8 ||
        wide != (layout.root_entries == 0))
        return damaged("the sizes in its boot sector contradict each other");
    volume.state_at = wide ? 65 : 37;
    volume.state = static_cast<std::uint8_t>(byte(volume.state_at));
    if (!wide) return volume;
    if ((word(40) & 0x80) != 0 || word(42) != 0)
        return fail(Errc::unsupported, "vfat", "its tables are not copies of each other, and it can only be read");
    volume.root = static_cast<std::uint32_t>(number(44));
    const auto info = word(48);
    if (info == 0 || info >= layout.reserved) return volume;
    TRY_VOID(disk.read({info * layout.sector}, boot));
    if (number(0) == lead_signature && number(484) == count_signature) volume.info_sector = info;
    return volume;
}

Result<void> FatTable::begin() {
    constexpr unsigned in_use = 1;
    const auto flags = TRY(get(1));
    const auto clean = bits() == 16 ? 0x8000U : bits() == 32 ? 0x08000000U : 0U;
    if ((volume_.state & in_use) != 0 || (flags & clean) != clean) {
        return fail(Errc::unsupported, "vfat",
                    "it is mounted, or was not unmounted; unmount it, or run fsck.fat before it is changed");
    }
    if ((flags & clean / 2) != clean / 2) return damaged("it is marked as damaged; run fsck.fat before it is changed");
    if (volume_.info_sector == 0) return {};
    std::vector<std::byte> info(512);
    TRY_VOID(disk_.read({volume_.info_sector * volume_.layout.sector}, info));
    if (const auto count = load_le<std::uint32_t>(info, free_count_at); count <= volume_.layout.clusters) free_ = count;
    next_ = load_le<std::uint32_t>(info, next_free_at);
    return {};
}

std::uint64_t FatTable::place_of_page(std::uint64_t index, std::uint64_t copy) const {
    const auto& layout = volume_.layout;
    return (layout.reserved + copy * layout.table_sectors) * layout.sector + index * page_links * bits() / 8;
}

Result<FatTable::Page*> FatTable::page_of(std::uint32_t cluster) {
    const std::uint64_t index = cluster / page_links;
    if (const auto found = pages_.find(index); found != pages_.end()) return &found->second;
    if (pages_.size() >= most_pages) std::erase_if(pages_, [](const auto& entry) { return !entry.second.changed(); });
    const auto& layout = volume_.layout;
    Page page;
    page.bytes.resize(std::min<std::uint64_t>(page_links * bits() / 8,
                                              layout.table_sectors * layout.sector - index * page_links * bits() / 8));
    TRY_VOID(disk_.read({place_of_page(index, 0)}, page.bytes));
    std::vector<std::byte> other(page.bytes.size());
    for (std::uint64_t copy = 1; copy < layout.tables; ++copy) {
        TRY_VOID(disk_.read({place_of_page(index, copy)}, other));
        if (other != page.bytes)
            return damaged("the copies of its table of clusters differ; run fsck.fat before it is changed");
    }
    return &pages_.emplace(index, std::move(page)).first->second;
}

Result<std::uint32_t> FatTable::get(std::uint32_t cluster) {
    return fat::load_link(TRY(page_of(cluster))->bytes, cluster % page_links, bits());
}

Result<void> FatTable::set(std::uint32_t cluster, std::uint32_t value) {
    auto& page = *TRY(page_of(cluster));
    const bool was_free = fat::load_link(page.bytes, cluster % page_links, bits()) == 0;
    fat::store_link(page.bytes, cluster % page_links, bits(), value);
    const std::uint64_t at = std::uint64_t{cluster % page_links} * bits() / 8;
    const auto sector = volume_.layout.sector;
    const auto begin = align_down(at, sector);
    page.begin = page.changed() ? std::min(page.begin, begin) : begin;
    // A link of FAT12 may lie in two sectors.
    page.end = std::max(page.end, std::min(divide_up(at + 4, sector) * sector, page.bytes.size()));
    if (free_ && was_free && value != 0) free_ = *free_ == 0 ? std::nullopt : std::optional(*free_ - 1);
    if (free_ && !was_free && value == 0) ++*free_;
    return {};
}

Result<std::vector<std::uint32_t>> FatTable::chain(std::uint32_t first) {
    std::vector<std::uint32_t> clusters;
    if (first == 0) return clusters;
    const auto end = volume_.layout.clusters + fat::first_cluster;
    const auto last = fat::end_of_chain(bits()) - 7;
    for (auto cluster = first; cluster < last;) {
        if (cluster < fat::first_cluster || cluster >= end)
            return damaged_cluster(cluster, "is part of a file, and none");
        clusters.push_back(cluster);
        if (clusters.size() > volume_.layout.clusters) return damaged_cluster(first, "begins a file that has no end");
        cluster = TRY(get(cluster));
    }
    return clusters;
}

Result<std::vector<std::uint32_t>> FatTable::take(std::uint64_t count, std::uint32_t last) {
    std::vector<std::uint32_t> clusters;
    const auto end = static_cast<std::uint32_t>(volume_.layout.clusters + fat::first_cluster);
    if (next_ < fat::first_cluster || next_ >= end) next_ = fat::first_cluster;
    auto cluster = next_;
    for (std::uint64_t seen = 0; clusters.size() < count; ++seen) {
        if (seen == volume_.layout.clusters) return fail(Errc::no_space, "", "the file system is full");
        if (TRY(get(cluster)) == 0) clusters.push_back(cluster);
        if (++cluster == end) cluster = fat::first_cluster;
    }
    next_ = cluster;
    for (const auto taken : clusters) {
        TRY_VOID(end_at(taken));
        if (last != 0) TRY_VOID(set(last, taken));
        last = taken;
    }
    return clusters;
}

Result<void> FatTable::write_back() {
    for (auto& [index, page] : pages_) {
        if (!page.changed()) continue;
        const auto bytes = std::span(page.bytes).subspan(page.begin, page.end - page.begin);
        for (std::uint64_t copy = 0; copy < volume_.layout.tables; ++copy)
            TRY_VOID(disk_.write({place_of_page(index, copy) + page.begin}, bytes));
        page.begin = page.end = 0;
    }
    return {};
}

Result<void> FatTable::write_info() {
    if (volume_.info_sector == 0) return {};
    std::vector<std::byte> counts(next_free_at + 4 - free_count_at);
    store_le(counts, 0, free_ ? static_cast<std::uint32_t>(*free_) : not_known);
    store_le(counts, next_free_at - free_count_at, next_);
    return disk_.write({volume_.info_sector * volume_.layout.sector + free_count_at}, counts);
}

}  // namespace qcow
