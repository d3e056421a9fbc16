#pragma once
// The boot sector and the table of clusters of a FAT file system that is changed in place.

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "base/try.h"
#include "filesystem/fat_format.h"
#include "qcow/disk.h"

namespace qcow {

/// What the boot sector says of a file system.
struct FatVolume {
    fat::Layout layout;
    std::uint32_t root = 0;         // the first cluster of the root of FAT32
    std::uint64_t info_sector = 0;  // of FAT32, which counts free clusters; 0: none
    std::uint64_t state_at = 0;     // in the boot sector: the byte whose lowest bit says that it is in use
    std::uint8_t state = 0;         // the value of that byte
};

/// Errors: Errc::corrupt; Errc::unsupported: tables that are not copies of each other.
Result<FatVolume> read_fat_volume(Disk& disk);

/// The table of clusters. Changes stay in memory until write_back().
///
/// Thread safety: one thread at a time.
class FatTable {
public:
    FatTable(Disk& disk, const FatVolume& volume) : disk_(disk), volume_(volume) {}

    /// Refuses a file system that was not unmounted or is marked as damaged, and learns how much is free.
    Result<void> begin();

    /// The clusters of a file, from `first` on; none for 0. Errors: Errc::corrupt.
    Result<std::vector<std::uint32_t>> chain(std::uint32_t first);

    /// Takes free clusters, which become a chain behind `last` (0: of its own). Errors: Errc::no_space: it takes none.
    Result<std::vector<std::uint32_t>> take(std::uint64_t count, std::uint32_t last);

    /// Makes clusters free, or the last one of its file.
    Result<void> release(std::uint32_t cluster) { return set(cluster, 0); }
    Result<void> end_at(std::uint32_t cluster) { return set(cluster, fat::end_of_chain(bits())); }

    /// Clusters; none: not known.
    [[nodiscard]] std::optional<std::uint64_t> free_clusters() const { return free_; }

    /// Writes what changed to all copies of the table.
    Result<void> write_back();
    /// Writes the number of free clusters, if the file system has a place for it.
    Result<void> write_info();

private:
    struct Page {
        std::vector<std::byte> bytes;
        // What changed, in bytes.
        std::size_t begin = 0;
        std::size_t end = 0;

        [[nodiscard]] bool changed() const { return begin < end; }
    };
    static constexpr std::uint32_t page_links = 65536;  // whole bytes for links of any width
    static constexpr std::size_t most_pages = 256;

    [[nodiscard]] unsigned bits() const { return volume_.layout.bits; }
    [[nodiscard]] std::uint64_t place_of_page(std::uint64_t index, std::uint64_t copy) const;
    Result<Page*> page_of(std::uint32_t cluster);
    Result<std::uint32_t> get(std::uint32_t cluster);
    Result<void> set(std::uint32_t cluster, std::uint32_t value);

    Disk& disk_;
    const FatVolume& volume_;
    std::map<std::uint64_t, Page> pages_;      // by the number of their first link, in pages
    std::uint32_t next_ = fat::first_cluster;  // where the search for a free cluster begins
    std::optional<std::uint64_t> free_;
};

}  // namespace qcow
