#pragma once
// The format of FAT12, FAT16 and FAT32, for all who read or write it: places, links, names, entries, times.

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/bits.h"

namespace qcow::fat {

constexpr std::uint64_t entry_bytes = 32;
constexpr std::uint64_t most_directory_bytes = 65536 * entry_bytes;
constexpr std::uint64_t longest_file = 0xffffffff;
constexpr std::uint32_t first_cluster = 2;

// ---- Places ----

/// Where the parts of a file system lie. Sizes are in sectors, if their names do not say bytes.
struct Layout {
    unsigned bits = 16;  // of a link in the table of clusters
    std::uint64_t sector = 512;
    std::uint64_t sectors = 0;
    std::uint64_t cluster_sectors = 1;
    std::uint64_t reserved = 1;
    std::uint64_t tables = 2;  // copies of the table
    std::uint64_t table_sectors = 1;
    std::uint64_t root_entries = 0;  // of FAT12 and FAT16, whose root lies behind the tables
    std::uint64_t clusters = 0;

    [[nodiscard]] std::uint64_t cluster_bytes() const { return cluster_sectors * sector; }
    [[nodiscard]] std::uint64_t root_sectors() const { return divide_up(root_entries * entry_bytes, sector); }
    [[nodiscard]] std::uint64_t root_start() const { return reserved + tables * table_sectors; }
    [[nodiscard]] std::uint64_t data_start() const { return root_start() + root_sectors(); }
    /// The first byte of a cluster.
    [[nodiscard]] std::uint64_t at(std::uint64_t cluster) const {
        return (data_start() + (cluster - first_cluster) * cluster_sectors) * sector;
    }
};

/// Fewest and most clusters, which alone say to readers how wide the links are.
std::pair<std::uint64_t, std::uint64_t> cluster_limits(unsigned bits);

// ---- Links ----

/// The link of the last cluster of a file. Links from seven less on mean the same.
std::uint32_t end_of_chain(unsigned bits);

/// The link number `index` of a table, which must lie within `table`.
std::uint32_t load_link(std::span<const std::byte> table, std::size_t index, unsigned bits);
/// Keeps the upper four bits of 32, which are reserved.
void store_link(std::span<std::byte> table, std::size_t index, unsigned bits, std::uint32_t value);

// ---- Names ----

/// Why a FAT file system cannot have this name; empty: it can.
std::string flaw_of(const std::string& name);

/// The name as it is compared: names with the same result are the same. Nothing if it is no UTF-8.
std::optional<std::u16string> folded(const std::string& name);

/// ASCII in capital letters.
std::string upper(std::string text);

/// The eleven bytes of a name that needs no long one: capital letters, eight of them and three behind a dot.
std::optional<std::string> exact_short_name(const std::string& name);

/// The short names of a directory.
class ShortNames {
public:
    /// Returns false if another file has the name.
    bool take(const std::string& short_name) { return taken_.insert(short_name).second; }
    void release(const std::string& short_name) { taken_.erase(short_name); }
    /// Takes and returns a short name for a file that has a long one.
    std::string made(const std::string& name);

private:
    std::set<std::string> taken_;
    // What is in front of and behind the number of a made name, and how many digits it has: numbers below are taken.
    std::map<std::tuple<std::string, std::string, std::size_t>, unsigned> next_;
};

// ---- Entries ----

constexpr std::uint8_t is_label = 0x08;
constexpr std::uint8_t is_directory = 0x10;
constexpr std::uint8_t is_archive = 0x20;
constexpr std::uint8_t is_long_name = 0x0f;
constexpr std::byte end_mark{0};  // the first byte of an entry: no entry follows
constexpr std::byte removed_mark{0xe5};

/// How many entries a file with this name takes: those of its long name, and one. flaw_of() must have found none.
std::size_t entries_of(const std::string& name);

/// Appends the entry of a file, without long name.
void add_entry(std::vector<std::byte>& to, const std::string& short_name, std::uint8_t attributes,
               std::uint32_t cluster, std::uint32_t size, std::int64_t mtime);

/// Appends the entries of a long name, which come before the entry of the file.
void add_long_name(std::vector<std::byte>& to, const std::string& name, const std::string& short_name);

/// The sum of a short name, which the entries of the long name repeat.
std::uint8_t sum_of(std::span<const std::byte> short_name);

/// Puts a long name together from the entries that come before the one of a file.
class LongName {
public:
    /// Takes an entry. Returns the name if the entry is the one of a file that has a long name.
    std::string take(std::span<const std::byte> entry);

private:
    void forget();

    std::vector<std::byte> text_;  // UTF-16
    unsigned left_ = 0;            // entries that are missing
    unsigned sum_ = 0;
};

// ---- Times ----

// In seconds since 1970.
constexpr std::int64_t first_time = 315'532'800;   // 1980-01-01 00:00:00
constexpr std::int64_t last_time = 4'354'819'198;  // 2107-12-31 23:59:58

struct Moment {
    std::uint16_t date;
    std::uint16_t time;
};

/// In UTC. Times that FAT cannot store become the nearest one that it can.
Moment moment_of(std::int64_t at);
/// Nothing for what is no time.
std::optional<std::int64_t> seconds_of(Moment moment);

}  // namespace qcow::fat
