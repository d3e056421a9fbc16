#pragma once
// What all writers of file systems get, and what they give.

#include "build/planned_disk.h"
#include "build/tree.h"
#include "qcow/build.h"

namespace qcow {

/// The place of an error in a part: the key of the file system or the partition in the text of the specification, or
/// the table that lacks it; and the name of the part. Without a text, only the name.
std::string place_of(std::string_view key, const FilesystemSpec* spec, const PartitionSpec* partition,
                     const std::string& name);

/// A file system that is to be made.
struct Volume {
    const FilesystemSpec& spec;
    Tree& tree;
    std::string name;  ///< for messages, such as "partition 2"
    Uuid uuid;
    Uuid hash_seed;
    std::int64_t time = 0;                     ///< seconds since 1970, for what the file system records of itself
    const PartitionSpec* partition = nullptr;  ///< null: the whole disk

    /// The place of an error: this key in the text of the specification, or the table that lacks it; and the name.
    [[nodiscard]] std::string at(std::string_view key) const { return place_of(key, &spec, partition, name); }
    /// The error of what this key asks for.
    [[nodiscard]] std::unexpected<Error> refuse(std::string_view key, std::string what) const {
        return fail(Errc::invalid_argument, at(key), std::move(what));
    }
};

struct Filled {
    std::uint64_t files = 0;  ///< of all kinds, with directories
    std::uint64_t free = 0;   ///< bytes
};

/// The times that a file system can store, in seconds since 1970.
struct TimeRange {
    std::int64_t first = 0;
    std::int64_t last = 0;
};
Result<TimeRange> times_of_ext(const Volume& volume);
TimeRange times_of_fat();

/// The error of a tree that does not fit.
std::unexpected<Error> does_not_fit(const Volume& volume, std::uint64_t needed, std::uint64_t there);

/// Returns the least size for the tree and FilesystemSpec::free_bytes, free_percent: a multiple of 4096 bytes.
Result<std::uint64_t> fitted_ext(const Volume& volume);
Result<std::uint64_t> fitted_fat(const Volume& volume, unsigned sector_size);

/// Writes the file system to [offset, offset + size) of the disk. Errors: Errc::no_space if the tree does not fit;
/// Errc::invalid_argument for what it cannot hold.
Result<Filled> write_ext(const Volume& volume, PlannedDisk& disk, std::uint64_t offset, std::uint64_t size);
Result<Filled> write_fat(const Volume& volume, PlannedDisk& disk, std::uint64_t offset, std::uint64_t size,
                         unsigned sector_size);

}  // namespace qcow
