#pragma once
// Reading an image's header, snapshot table and bitmap directory from its file.

#include <functional>
#include <vector>

#include "format/tables.h"
#include "qcow2/metadata/metadata.h"

namespace qcow::qcow2 {

/// The first cluster, as much of it as the file has. Errors: those of header_bytes().
Result<std::vector<std::byte>> read_first_cluster(const Storage& file);

struct SnapshotTable {
    std::vector<format::SnapshotEntry> entries;
    std::uint64_t bytes = 0;  // that the table takes in the file
};
Result<SnapshotTable> read_snapshots(const Metadata& metadata);

/// The bitmaps that the header's extension announces; none where it is not to be believed.
Result<std::vector<format::BitmapEntry>> read_bitmaps(const Metadata& metadata);

/// `entries` words of a table as they are now, in the cache or in the file.
Result<std::vector<std::uint64_t>> load_words(const Metadata& metadata, HostOffset table, std::uint64_t entries);

/// Returns the indices of the snapshots with this id; if there is none, of those with this name. If there is none
/// either, "snapshot.id=ID" means an id, and "snapshot.name=NAME" a name.
std::vector<std::size_t> find_snapshots(std::span<const format::SnapshotEntry> snapshots, std::string_view id_or_name);

/// The words as a table in a file has them, with zeros behind them: `bytes` in all.
std::vector<std::byte> encode_words(std::span<const std::uint64_t> words, std::uint64_t bytes);

/// The two in one.
Result<std::vector<std::byte>> copy_words(const Metadata& metadata, HostOffset table, std::uint64_t entries,
                                          std::uint64_t bytes);

/// An L1 table that a snapshot names: aligned, within the file, large enough for the snapshot's disk.
Result<void> verify_snapshot_l1(const Metadata& metadata, const format::SnapshotEntry& snapshot);

}  // namespace qcow::qcow2
