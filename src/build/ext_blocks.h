#pragma once
// The blocks of ext that hold directories, extents and indirect blocks, as bytes. Numbers are little-endian.

#include <cstdint>
#include <functional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "build/tree.h"

namespace qcow {

/// A run of blocks: of a file, and of the file system.
struct PhysicalRun {
    std::uint64_t logical = 0;
    std::uint64_t physical = 0;
    std::uint64_t length = 0;
};

/// The runs of a file in whole blocks.
std::vector<DataRun> block_runs(const TreeInode& inode, std::uint64_t block_size);

/// The blocks of the largest file.
std::uint64_t largest_file_blocks(bool extents, std::uint64_t block_size);

/// Takes and writes blocks for tables.
struct BlockWriter {
    std::uint64_t block_size;
    std::function<Result<std::uint64_t>()> take;
    std::function<Result<void>(std::uint64_t block, std::span<const std::byte> bytes)> write;
};

// ---- Extents ----

/// At most so many blocks of extents lead to the runs of a file: the tables of block groups divide runs.
std::uint64_t extent_blocks_at_most(std::span<const DataRun> runs, std::uint64_t block_size);

/// Fills the 60 bytes of an inode with extents, and writes the blocks of the tree below. `seal` sets the checksum of a
/// block. Returns the number of these blocks.
Result<std::uint64_t> write_extents(std::span<std::byte> root, const std::vector<PhysicalRun>& runs,
                                    const BlockWriter& writer,
                                    const std::function<Result<void>(std::span<std::byte>)>& seal);

// ---- Indirect blocks ----

/// The number of indirect blocks that lead to the runs of a file.
std::uint64_t indirect_blocks(std::span<const DataRun> runs, std::uint64_t block_size);

/// Fills the 60 bytes of an inode with block numbers, and writes the indirect blocks. Returns the number of these.
Result<std::uint64_t> write_indirect_blocks(std::span<std::byte> root, const std::vector<PhysicalRun>& runs,
                                            const BlockWriter& writer);

// ---- Directories ----

struct DirectoryShape {
    std::uint64_t block_size;
    bool checksums;  ///< blocks end with a checksum
    bool indexed;    ///< directories of several blocks have a hash tree
};

/// The major and the minor hash of a name.
using NameHash = std::function<std::pair<std::uint32_t, std::uint32_t>(std::string_view)>;

struct DirectoryBlocks {
    std::vector<std::vector<std::byte>> blocks;  ///< without their checksums
    bool indexed = false;
};

/// At least the number of blocks that the directory takes.
std::uint64_t blocks_of_directory(const Children& children, const DirectoryShape& shape);

std::vector<std::byte> empty_directory_block(const DirectoryShape& shape);

class Directory {
public:
    /// The children are numbered.
    Directory(const Children& children, std::uint32_t own, std::uint32_t parent)
        : children_(children), own_(own), parent_(parent) {}

    /// Returns nothing if there are too many files.
    [[nodiscard]] std::optional<DirectoryBlocks> blocks(const DirectoryShape& shape, const NameHash& hash) const;

private:
    struct Hashed;
    [[nodiscard]] DirectoryBlocks linear(const DirectoryShape& shape) const;

    const Children& children_;
    std::uint32_t own_;
    std::uint32_t parent_;
};

}  // namespace qcow
