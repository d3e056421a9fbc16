// FAT12, FAT16 and FAT32 with long names.

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <set>

#include "base/bits.h"
#include "build/volume.h"
#include "filesystem/fat_format.h"
#include "filesystem/little_endian.h"
#include "qcow/text.h"

namespace qcow {
namespace {

using namespace fat;

constexpr std::uint64_t usual_root_entries = 512;
constexpr std::uint64_t most_root_entries = 65520;
constexpr std::uint64_t largest_cluster = 32 * KiB;
constexpr std::uint32_t fat32_reserved = 32;  // sectors
constexpr std::uint32_t fat32_backup = 6;     // the sector with the copy of the first one

/// Refuses what a key of the specification says.
std::unexpected<Error> refuse_file(const Volume& volume, const std::string& path, std::string_view what) {
    return fail(Errc::invalid_argument, fmt::format("{}: {}", volume.at("source"), printable(path)), std::string(what));
}

// ---- Layout ----

/// Fills in the rest; false: the number of clusters is not one of this kind of FAT.
bool lay_out(Layout& layout) {
    layout.reserved = layout.bits == 32 ? fat32_reserved : 1;
    for (layout.table_sectors = 1;;) {
        const auto overhead = layout.data_start();
        // Clusters are aligned, as far as the partition is.
        const auto padding = (layout.cluster_sectors - overhead % layout.cluster_sectors) % layout.cluster_sectors;
        if (overhead + padding >= layout.sectors) return false;
        layout.clusters = (layout.sectors - overhead - padding) / layout.cluster_sectors;
        const auto needed = divide_up(divide_up((layout.clusters + first_cluster) * layout.bits, 8), layout.sector);
        if (needed <= layout.table_sectors) {
            layout.reserved += padding;
            break;
        }
        layout.table_sectors = needed;
    }
    const auto [fewest, most] = cluster_limits(layout.bits);
    return layout.clusters >= fewest && layout.clusters <= most;
}

unsigned bits_of(FilesystemSpec::Type type, std::uint64_t size) {
    switch (type) {
        case FilesystemSpec::Type::fat12: return 12;
        case FilesystemSpec::Type::fat16: return 16;
        case FilesystemSpec::Type::fat32: return 32;
        default: return size < 4 * MiB ? 12 : size < 512 * MiB ? 16 : 32;
    }
}

std::uint64_t preferred_cluster(unsigned bits, std::uint64_t size) {
    if (bits != 32) return size < 16 * MiB ? 2 * KiB : 4 * KiB;
    return size <= 260 * MiB ? 512 : size <= 8 * GiB ? 4 * KiB : size <= 16 * GiB ? 8 * KiB : 16 * KiB;
}

Result<Layout> layout_of(const Volume& volume, std::uint64_t size, std::uint64_t sector, std::uint64_t root_entries) {
    Layout layout{.bits = bits_of(volume.spec.type, size), .sector = sector, .sectors = size / sector};
    if (layout.bits != 32) layout.root_entries = root_entries;
    if (layout.sectors > 0xffffffff) return volume.refuse("size", "FAT has at most 2^32 sectors");
    std::vector<std::uint64_t> candidates;
    if (volume.spec.block_size) {
        if (*volume.spec.block_size < sector || *volume.spec.block_size > 64 * KiB) {
            return volume.refuse("block_size",
                                 fmt::format("FAT wants a block_size (of a cluster) from {} to 65536", sector));
        }
        candidates = {*volume.spec.block_size};
    } else {
        const auto preferred = std::max(preferred_cluster(layout.bits, size), sector);
        for (auto bytes = preferred; bytes <= largest_cluster; bytes *= 2) candidates.push_back(bytes);
        for (auto bytes = preferred / 2; bytes >= sector; bytes /= 2) candidates.push_back(bytes);
    }
    for (const auto bytes : candidates) {
        layout.cluster_sectors = bytes / sector;
        if (lay_out(layout)) return layout;
    }
    const auto [fewest, most] = cluster_limits(layout.bits);
    return fail(Errc::no_space, volume.at("size"),
                fmt::format("{} bytes are no size for FAT{}, which has {} to {} clusters of {} bytes", size,
                            layout.bits, fewest, most,
                            volume.spec.block_size ? fmt::to_string(*volume.spec.block_size)
                                                   : fmt::format("{} to {}", sector, largest_cluster)));
}

// ---- What the tree takes ----

struct FatNeeds {
    std::vector<std::uint64_t> sizes;  // of files and directories, in bytes
    std::uint64_t root_entries = 1;    // with the label
    std::uint64_t files = 0;

    [[nodiscard]] std::uint64_t clusters(const Layout& layout) const {
        std::uint64_t all = 0;
        for (const auto size : sizes) all += divide_up(size, layout.cluster_bytes());
        if (layout.bits == 32) all += divide_up(root_entries * entry_bytes, layout.cluster_bytes());
        return all;
    }
};

Result<void> count(const Volume& volume, const Children& children, const std::string& path, bool root,
                   FatNeeds& needs) {
    std::uint64_t entries = root ? 1 : 2;
    std::set<std::u16string> names;
    for (const auto& entry : children.entries()) {
        const std::string name(entry.name.text());
        const auto& inode = *entry.inode;
        const auto place = fmt::format("{}/{}", path, name);
        ++needs.files;
        if (const auto flaw = flaw_of(name); !flaw.empty()) return refuse_file(volume, place, flaw);
        if (!names.insert(*folded(name)).second)
            return refuse_file(volume, place, "another name in its directory differs only in case, which FAT ignores");
        entries += entries_of(name);
        if (inode.is_directory()) {
            TRY_VOID(count(volume, *inode.children, place, false, needs));
        } else if (!S_ISREG(inode.mode)) {
            return refuse_file(volume, place, "FAT holds only regular files and directories");
        } else if (inode.size > longest_file) {
            return refuse_file(volume, place, "FAT holds files of less than 4 GiB");
        } else {
            needs.sizes.push_back(inode.size);
        }
    }
    if (entries * entry_bytes > most_directory_bytes)
        return refuse_file(volume, path, "the directory has too many files");
    if (root) {
        needs.root_entries = entries;
    } else {
        needs.sizes.push_back(entries * entry_bytes);
    }
    return {};
}

Result<FatNeeds> needs_of(const Volume& volume) {
    FatNeeds needs{.sizes = {}, .files = 1};
    TRY_VOID(count(volume, *volume.tree.root().children, "", true, needs));
    return needs;
}

std::uint64_t root_entries_for(const FatNeeds& needs, std::uint64_t sector) {
    const auto in_sector = sector / entry_bytes;
    return std::max(usual_root_entries, divide_up(needs.root_entries, in_sector) * in_sector);
}

// ---- Writing ----

class FatWriter {
public:
    FatWriter(const Volume& volume, PlannedDisk& disk, std::uint64_t offset, const Layout& layout)
        : volume_(volume), disk_(disk), offset_(offset), layout_(layout), table_(first_cluster) {
        const std::uint32_t end = end_of_chain(layout_.bits);
        table_[0] = (end & ~0xffU) | 0xf8;
        table_[1] = end;
    }

    Result<void> run() {
        label_ = upper(volume_.spec.label);
        if (label_.size() > 11) return volume_.refuse("label", "the label is longer than the 11 bytes that FAT has");
        for (const char c : label_) {
            if (static_cast<std::uint8_t>(c) < 0x20 || static_cast<std::uint8_t>(c) > 0x7e ||
                std::string_view("\"*+,./:;<=>?[\\]|").contains(c)) {
                return volume_.refuse("label",
                                      fmt::format("FAT has no labels with the character \"{}\"", printable({&c, 1})));
            }
        }
        const auto& children = *volume_.tree.root().children;
        std::vector<std::byte> root;
        if (!label_.empty()) add_entry(root, fmt::format("{:<11}", label_), is_label, 0, 0, volume_.time);
        const auto root_bytes = bytes_of(children, root.size());
        const std::uint32_t start = layout_.bits == 32 ? take(std::max<std::uint64_t>(root_bytes, 1)) : 0;
        TRY_VOID(add_children(root, children, 0));
        if (layout_.bits == 32) {
            TRY_VOID(write(layout_.at(start), root));
        } else {
            TRY_VOID(write(layout_.root_start() * layout_.sector, root));
        }
        TRY_VOID(write_table());
        return write_boot_sectors(start);
    }

    [[nodiscard]] std::uint64_t free_clusters() const { return layout_.clusters + first_cluster - table_.size(); }

private:
    Result<void> write(std::uint64_t at, std::span<const std::byte> bytes) {
        return disk_.write({offset_ + at}, bytes);
    }

    /// Takes clusters behind each other, and returns the first one; 0 for none.
    std::uint32_t take(std::uint64_t bytes) {
        const auto count = divide_up(bytes, layout_.cluster_bytes());
        if (count == 0) return 0;
        const auto first = static_cast<std::uint32_t>(table_.size());
        for (std::uint64_t i = 1; i < count; ++i) table_.push_back(static_cast<std::uint32_t>(table_.size() + 1));
        table_.push_back(end_of_chain(layout_.bits));
        return first;
    }

    static std::uint64_t bytes_of(const Children& children, std::uint64_t before) {
        for (const auto& entry : children.entries()) before += entries_of(std::string(entry.name.text())) * entry_bytes;
        return before;
    }

    /// Adds the entries of a directory, and writes what they lead to. `own` is its cluster, 0 for the root.
    Result<void> add_children(std::vector<std::byte>& to, const Children& children, std::uint32_t own) {
        ShortNames short_names;
        for (const auto& entry : children.entries()) {
            if (const auto exact = exact_short_name(std::string(entry.name.text()))) short_names.take(*exact);
        }
        std::map<std::string_view, std::string> made;
        // Names that differ only in case come before those that are made up.
        for (const auto& entry : children.entries()) {
            const std::string name(entry.name.text());
            if (!exact_short_name(name) && exact_short_name(upper(name)))
                made[entry.name.text()] = short_names.made(name);
        }
        for (const auto& entry : children.entries()) {
            const std::string name(entry.name.text());
            auto short_name = exact_short_name(name);
            if (!short_name) {
                const auto known = made.find(name);
                short_name = known != made.end() ? known->second : short_names.made(name);
                add_long_name(to, name, *short_name);
            }
            const auto& inode = *entry.inode;
            if (!inode.is_directory()) {
                const auto cluster = take(inode.size);
                for (const auto& run : inode.runs()) place(inode, cluster, run);
                add_entry(to, *short_name, is_archive, cluster, static_cast<std::uint32_t>(inode.size), inode.mtime);
                continue;
            }
            const auto cluster = take(bytes_of(*inode.children, 2 * entry_bytes));
            add_entry(to, *short_name, is_directory, cluster, 0, inode.mtime);
            std::vector<std::byte> below;
            add_entry(below, fmt::format("{:<11}", "."), is_directory, cluster, 0, inode.mtime);
            add_entry(below, fmt::format("{:<11}", ".."), is_directory, own, 0, inode.mtime);
            TRY_VOID(add_children(below, *inode.children, cluster));
            TRY_VOID(write(layout_.at(cluster), below));
        }
        return {};
    }

    /// Whole sectors of a run.
    void place(const TreeInode& inode, std::uint32_t cluster, DataRun run) {
        const auto begin = align_down(run.start, layout_.sector);
        disk_.place({offset_ + layout_.at(cluster) + begin}, run.start + run.length - begin, *inode.content, begin);
    }

    Result<void> write_table() {
        std::vector<std::byte> bytes(divide_up(table_.size() * layout_.bits, 8) + 2);
        for (std::size_t i = 0; i < table_.size(); ++i) store_link(bytes, i, layout_.bits, table_[i]);
        const auto length = std::min<std::uint64_t>(bytes.size(), layout_.table_sectors * layout_.sector);
        for (std::uint64_t i = 0; i < layout_.tables; ++i) {
            TRY_VOID(
                write((layout_.reserved + i * layout_.table_sectors) * layout_.sector, std::span(bytes).first(length)));
        }
        return {};
    }

    Result<std::uint32_t> option(const std::string& name, std::uint32_t usual, std::uint32_t most) const {
        const auto found = volume_.spec.options.find(name);
        if (found == volume_.spec.options.end()) return usual;
        std::uint32_t value = 0;
        const auto* end = found->second.data() + found->second.size();
        const auto [last, error] = std::from_chars(found->second.data(), end, value);
        if (error != std::errc() || last != end || value > most) {
            return volume_.refuse("options." + name,
                                  fmt::format("option {} wants a whole number up to {}", name, most));
        }
        return value;
    }

    Result<void> write_boot_sectors(std::uint32_t root) {
        std::vector<std::byte> boot(layout_.sector);
        const std::span bytes(boot);
        const bool wide = layout_.bits == 32;
        bytes[0] = std::byte{0xeb};
        bytes[1] = wide ? std::byte{0x58} : std::byte{0x3c};
        bytes[2] = std::byte{0x90};
        std::ranges::copy(as_bytes("MSWIN4.1"), bytes.subspan(3).begin());
        store_le(bytes, 11, static_cast<std::uint16_t>(layout_.sector));
        bytes[13] = static_cast<std::byte>(layout_.cluster_sectors);
        store_le(bytes, 14, static_cast<std::uint16_t>(layout_.reserved));
        bytes[16] = static_cast<std::byte>(layout_.tables);
        store_le(bytes, 17, static_cast<std::uint16_t>(layout_.root_entries));
        if (!wide && layout_.sectors < 0x10000) {
            store_le(bytes, 19, static_cast<std::uint16_t>(layout_.sectors));
        } else {
            store_le(bytes, 32, static_cast<std::uint32_t>(layout_.sectors));
        }
        bytes[21] = std::byte{0xf8};
        if (!wide) store_le(bytes, 22, static_cast<std::uint16_t>(layout_.table_sectors));
        store_le(bytes, 24, static_cast<std::uint16_t>(TRY(option("sectors_per_track", 63, 0xffff))));
        store_le(bytes, 26, static_cast<std::uint16_t>(TRY(option("heads", 255, 0xffff))));
        const auto hidden = std::min<std::uint64_t>(offset_ / layout_.sector, 0xffffffff);
        store_le(bytes, 28, TRY(option("hidden_sectors", static_cast<std::uint32_t>(hidden), 0xffffffff)));
        if (wide) {
            store_le(bytes, 36, static_cast<std::uint32_t>(layout_.table_sectors));
            store_le(bytes, 44, root);
            store_le<std::uint16_t>(bytes, 48, 1);  // the sector that counts free clusters
            store_le(bytes, 50, static_cast<std::uint16_t>(fat32_backup));
        }
        const std::size_t extended = wide ? 64 : 36;
        bytes[extended] = std::byte{0x80};
        bytes[extended + 2] = std::byte{0x29};
        for (unsigned i = 0; i < 4; ++i) bytes[extended + 3 + i] = std::byte{volume_.uuid[3 - i]};
        const auto name = fmt::format("{:<11}", label_.empty() ? "NO NAME" : label_);
        std::ranges::copy(as_bytes(name), bytes.subspan(extended + 7).begin());
        std::ranges::copy(as_bytes(fmt::format("FAT{}   ", layout_.bits)), bytes.subspan(extended + 18).begin());
        // Whoever boots it: the next device, please.
        bytes[extended + 26] = std::byte{0xcd};
        bytes[extended + 27] = std::byte{0x18};
        bytes[extended + 28] = std::byte{0xeb};
        bytes[extended + 29] = std::byte{0xfe};
        store_le<std::uint16_t>(bytes, 510, 0xaa55);
        TRY_VOID(write(0, boot));
        if (!wide) return {};
        TRY_VOID(write(fat32_backup * layout_.sector, boot));
        std::vector<std::byte> info(layout_.sector);
        store_le<std::uint32_t>(info, 0, 0x41615252);
        store_le<std::uint32_t>(info, 484, 0x61417272);
        store_le(info, 488, static_cast<std::uint32_t>(free_clusters()));
        store_le(info, 492, static_cast<std::uint32_t>(table_.size() - 1));
        store_le<std::uint32_t>(info, 508, 0xaa550000);
        TRY_VOID(write(layout_.sector, info));
        return write((fat32_backup + 1) * layout_.sector, info);
    }

    const Volume& volume_;
    PlannedDisk& disk_;
    std::uint64_t offset_;
    const Layout& layout_;
    std::string label_;
    std::vector<std::uint32_t> table_;  // up to the last cluster in use
};

Result<void> verify_options(const Volume& volume) {
    const std::vector<std::string> known = {"sectors_per_track", "heads", "hidden_sectors"};
    for (const auto& [name, value] : volume.spec.options) {
        if (std::ranges::find(known, name) == known.end()) {
            return volume.refuse("options." + name,
                                 fmt::format("FAT has no option \"{}\"{}", printable(name), did_you_mean(name, known)));
        }
    }
    return {};
}

}  // namespace

Result<std::uint64_t> fitted_fat(const Volume& volume, unsigned sector_size) {
    const auto needs = TRY(needs_of(volume));
    const auto root_entries = root_entries_for(needs, sector_size);
    std::uint64_t size = 64 * KiB;
    for (;;) {
        size = divide_up(size, 4096) * 4096;
        const auto layout = layout_of(volume, size, sector_size, root_entries);
        if (!layout) {
            const auto most = cluster_limits(bits_of(volume.spec.type, size)).second *
                              volume.spec.block_size.value_or(largest_cluster);
            if (layout.error().code != Errc::no_space || size > most) return std::unexpected(layout.error());
            size += std::max(size / 64, 64 * KiB);
            continue;
        }
        const auto used = needs.clusters(*layout);
        const auto wanted =
            used + used * volume.spec.free_percent / 100 + divide_up(volume.spec.free_bytes, layout->cluster_bytes());
        if (layout->clusters >= wanted) return size;
        size += std::max((wanted - layout->clusters) * layout->cluster_bytes(), 4 * KiB);
    }
}

TimeRange times_of_fat() { return {first_time, last_time}; }

Result<Filled> write_fat(const Volume& volume, PlannedDisk& disk, std::uint64_t offset, std::uint64_t size,
                         unsigned sector_size) {
    TRY_VOID(verify_options(volume));
    const auto needs = TRY(needs_of(volume));
    const auto root_entries = root_entries_for(needs, sector_size);
    const auto layout = TRY(layout_of(volume, size, sector_size, root_entries));
    if (layout.bits != 32 && root_entries > most_root_entries)
        return volume.refuse("source", "the root directory has too many files for FAT12 and FAT16; use fat32");
    if (needs.clusters(layout) > layout.clusters) {
        return does_not_fit(volume, needs.clusters(layout) * layout.cluster_bytes(),
                            layout.clusters * layout.cluster_bytes());
    }
    FatWriter writer(volume, disk, offset, layout);
    TRY_VOID(writer.run());
    return Filled{.files = needs.files, .free = writer.free_clusters() * layout.cluster_bytes()};
}

}  // namespace qcow
