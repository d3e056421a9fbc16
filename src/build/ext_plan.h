#pragma once
// What an ext file system will be: its features, what the tree takes in it, and its size.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "base/bits.h"
#include "build/ext_blocks.h"
#include "build/volume.h"
#include "filesystem/ext_io.h"

namespace qcow {

inline constexpr std::uint32_t least_inode_size = 128;
inline constexpr std::string_view lost_found = "lost+found";
inline constexpr std::uint64_t lost_found_bytes = 16 * KiB;  // so that a check has room to put files there

/// What the specification says of the file system, apart from its size.
struct ExtPlan {
    std::uint32_t block_size = 4096;
    std::uint32_t inode_size = 256;
    std::optional<std::uint64_t> inodes;
    std::optional<std::uint64_t> journal_blocks;
    unsigned reserved_percent = 0;
    ext2_super_block super = {};  // with the features

    [[nodiscard]] bool has(std::uint32_t ext2_super_block::* word, std::uint32_t bit) const {
        return (super.*word & bit) != 0;
    }
    [[nodiscard]] bool extents() const {
        return has(&ext2_super_block::s_feature_incompat, EXT3_FEATURE_INCOMPAT_EXTENTS);
    }
    [[nodiscard]] bool journal() const {
        return has(&ext2_super_block::s_feature_compat, EXT3_FEATURE_COMPAT_HAS_JOURNAL);
    }
    [[nodiscard]] bool checksums() const {
        return has(&ext2_super_block::s_feature_ro_compat, EXT4_FEATURE_RO_COMPAT_METADATA_CSUM);
    }
    [[nodiscard]] bool indexed() const {
        return has(&ext2_super_block::s_feature_compat, EXT2_FEATURE_COMPAT_DIR_INDEX);
    }
    [[nodiscard]] DirectoryShape shape() const { return {block_size, checksums(), indexed()}; }
};

/// What the tree takes.
struct ExtNeeds {
    std::uint64_t blocks = 0;
    std::uint64_t inodes = 0;
    std::uint64_t files = 0;
};

struct CloseExt {
    void operator()(ext2_filsys fs) const { ext2fs_free(fs); }
};
using ExtHandle = std::unique_ptr<struct_ext2_filsys, CloseExt>;

Result<ExtPlan> plan_of_ext(const Volume& volume);

/// The blocks that a file system of the size has for its journal; 0: it is too small for one.
std::uint64_t journal_blocks_of_ext(const ExtPlan& plan, std::uint64_t blocks);

/// Counts the links of each file, and gives the tree a lost+found. Errors: Errc::invalid_argument for a file that ext
/// cannot hold.
Result<ExtNeeds> needs_of_ext(const Volume& volume, const ExtPlan& plan);

/// Begins a file system of this many blocks. Nothing is written.
Result<ext2_filsys> begin_ext(ExtIo& io, const Volume& volume, const ExtPlan& plan, const ExtNeeds& needs,
                              std::uint64_t blocks);

/// The blocks that files can take in a file system that has begun.
std::uint64_t room_of_ext(ext2_filsys fs, const ExtPlan& plan);

/// Refuses a file. The place of such an error is its path, as far as that is known.
std::unexpected<Error> refuse_file(std::string what);
std::unexpected<Error> failed_file(Error error, std::string_view name);
/// The error of a tree, with where it is from.
std::unexpected<Error> failed_tree(const Volume& volume, Error error);

}  // namespace qcow
