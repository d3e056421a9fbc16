// ext2, ext3 and ext4 by libext2fs. The library makes the file system, its tables, journal and attributes. Directories,
// extents and indirect blocks are written here: their contents are known from the start, so each block is written once,
// and the time is linear in the number of files.

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstring>
#include <unordered_set>

#include "base/bits.h"
#include "build/ext_blocks.h"
#include "build/volume.h"
#include "filesystem/ext_io.h"
#include "qcow/text.h"

namespace qcow {
namespace {

constexpr std::uint32_t least_inode_size = 128;
constexpr ext2_ino_t lost_found_number = 11;
constexpr std::string_view lost_found = "lost+found";
constexpr std::uint64_t lost_found_bytes = 16 * KiB;  // so that a check has room to put files there
constexpr std::uint32_t most_links = 65000;
constexpr std::uint64_t bytes_per_inode = 16 * KiB;
constexpr std::uint64_t least_with_journal = 2048;  // blocks

struct Feature {
    std::string_view name;
    std::uint32_t ext2_super_block::* word;
    std::uint32_t bit;
};
constexpr auto features = std::to_array<Feature>({
    {"dir_index", &ext2_super_block::s_feature_compat, EXT2_FEATURE_COMPAT_DIR_INDEX},
    {"has_journal", &ext2_super_block::s_feature_compat, EXT3_FEATURE_COMPAT_HAS_JOURNAL},
    {"resize_inode", &ext2_super_block::s_feature_compat, EXT2_FEATURE_COMPAT_RESIZE_INODE},
    {"sparse_super2", &ext2_super_block::s_feature_compat, EXT4_FEATURE_COMPAT_SPARSE_SUPER2},
    {"64bit", &ext2_super_block::s_feature_incompat, EXT4_FEATURE_INCOMPAT_64BIT},
    {"extents", &ext2_super_block::s_feature_incompat, EXT3_FEATURE_INCOMPAT_EXTENTS},
    {"flex_bg", &ext2_super_block::s_feature_incompat, EXT4_FEATURE_INCOMPAT_FLEX_BG},
    {"metadata_csum_seed", &ext2_super_block::s_feature_incompat, EXT4_FEATURE_INCOMPAT_CSUM_SEED},
    {"dir_nlink", &ext2_super_block::s_feature_ro_compat, EXT4_FEATURE_RO_COMPAT_DIR_NLINK},
    {"extra_isize", &ext2_super_block::s_feature_ro_compat, EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE},
    {"huge_file", &ext2_super_block::s_feature_ro_compat, EXT4_FEATURE_RO_COMPAT_HUGE_FILE},
    {"large_file", &ext2_super_block::s_feature_ro_compat, EXT2_FEATURE_RO_COMPAT_LARGE_FILE},
    {"metadata_csum", &ext2_super_block::s_feature_ro_compat, EXT4_FEATURE_RO_COMPAT_METADATA_CSUM},
    {"sparse_super", &ext2_super_block::s_feature_ro_compat, EXT2_FEATURE_RO_COMPAT_SPARSE_SUPER},
    {"uninit_bg", &ext2_super_block::s_feature_ro_compat, EXT4_FEATURE_RO_COMPAT_GDT_CSUM},
});

/// What the specification says of the file system, apart from its size.
struct Plan {
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

/// Refuses what a key of the specification says.
/// Refuses a file. The place of such an error is its path, as far as that is known.
std::unexpected<Error> refuse_file(std::string what) { return fail(Errc::invalid_argument, "", std::move(what)); }
std::unexpected<Error> failed(Error error, std::string_view name) {
    if (error.code == Errc::invalid_argument) error.place = fmt::format("/{}{}", printable(name), error.place);
    return std::unexpected(std::move(error));
}
/// The error of a tree, with where it is from.
std::unexpected<Error> failed_tree(const Volume& volume, Error error) {
    if (error.code == Errc::invalid_argument) error = std::move(error).in(volume.at("source"));
    return std::unexpected(std::move(error));
}

Result<std::uint64_t> number_option(const Volume& volume, const std::string& name, const std::string& text,
                                    std::uint64_t least, std::uint64_t most) {
    std::uint64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < least || value > most) {
        return volume.refuse("options." + name,
                             fmt::format("option {} wants a whole number from {} to {}", name, least, most));
    }
    return value;
}

void set_default_features(Plan& plan, FilesystemSpec::Type type) {
    auto& super = plan.super;
    super.s_feature_compat =
        EXT2_FEATURE_COMPAT_EXT_ATTR | EXT2_FEATURE_COMPAT_RESIZE_INODE | EXT2_FEATURE_COMPAT_DIR_INDEX;
    super.s_feature_incompat = EXT2_FEATURE_INCOMPAT_FILETYPE;
    super.s_feature_ro_compat = EXT2_FEATURE_RO_COMPAT_SPARSE_SUPER | EXT2_FEATURE_RO_COMPAT_LARGE_FILE;
    if (type == FilesystemSpec::Type::ext2) return;
    super.s_feature_compat |= EXT3_FEATURE_COMPAT_HAS_JOURNAL;
    if (type == FilesystemSpec::Type::ext3) return;
    super.s_feature_incompat |=
        EXT3_FEATURE_INCOMPAT_EXTENTS | EXT4_FEATURE_INCOMPAT_64BIT | EXT4_FEATURE_INCOMPAT_FLEX_BG;
    super.s_feature_ro_compat |= EXT4_FEATURE_RO_COMPAT_HUGE_FILE | EXT4_FEATURE_RO_COMPAT_DIR_NLINK |
                                 EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE | EXT4_FEATURE_RO_COMPAT_METADATA_CSUM;
}

Result<Plan> plan_of(const Volume& volume) {
    Plan plan;
    const auto& spec = volume.spec;
    plan.block_size = spec.block_size.value_or(4096);
    if (plan.block_size != 1024 && plan.block_size != 2048 && plan.block_size != 4096)
        return volume.refuse("block_size", "ext wants a block_size of 1024, 2048 or 4096");
    if (spec.label.size() > EXT2_LABEL_LEN)
        return volume.refuse("label", "the label is longer than the 16 bytes that ext has");
    set_default_features(plan, spec.type);
    std::vector<std::string> known = {"journal_blocks", "inodes", "inode_size", "reserved_percent"};
    for (const auto& feature : features) known.emplace_back(feature.name);
    for (const auto& option : spec.options) {
        const auto& name = option.first;
        const auto& text = option.second;
        const auto number = [&](std::uint64_t least, std::uint64_t most) {
            return number_option(volume, name, text, least, most);
        };
        const auto feature = std::ranges::find(features, std::string_view(name), &Feature::name);
        if (feature != features.end()) {
            if (text != "on" && text != "off") {
                return volume.refuse("options." + name,
                                     fmt::format("option {} is \"{}\", and must be on or off", name, printable(text)));
            }
            (plan.super.*feature->word &= ~feature->bit) |= text == "on" ? feature->bit : 0;
        } else if (name == "journal_blocks") {
            plan.journal_blocks = TRY(number(1024, 10240000));
        } else if (name == "inodes") {
            plan.inodes = TRY(number(16, 0xfffffff0));
        } else if (name == "inode_size") {
            const auto size = TRY(number(least_inode_size, plan.block_size));
            if (!std::has_single_bit(size))
                return volume.refuse("options." + name, "option inode_size wants a power of two");
            plan.inode_size = static_cast<std::uint32_t>(size);
        } else if (name == "reserved_percent") {
            plan.reserved_percent = static_cast<unsigned>(TRY(number(0, 50)));
        } else {
            return volume.refuse("options." + name,
                                 fmt::format("ext has no option \"{}\"{}", printable(name), did_you_mean(name, known)));
        }
    }
    // Without these, nothing can grow later or hold attributes; e2fsck refuses some combinations.
    if (plan.inode_size == least_inode_size) plan.super.s_feature_ro_compat &= ~EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE;
    return plan;
}

/// The blocks that a file system of the size has for its journal; 0: it is too small for one.
std::uint64_t journal_blocks(const Plan& plan, std::uint64_t blocks) {
    if (!plan.journal()) return 0;
    if (plan.journal_blocks) return *plan.journal_blocks;
    const int usual = ext2fs_default_journal_size(blocks);
    return usual < 0 ? 0 : static_cast<std::uint64_t>(usual);
}

/// What the tree takes.
struct ExtNeeds {
    std::uint64_t blocks = 0;
    std::uint64_t inodes = 0;
    std::uint64_t files = 0;
};

/// Attributes in the inode, behind its fields, take this many bytes; others need a block.
bool fits_in_inode(const Plan& plan, const TreeInode::Rare& rare) {
    std::uint64_t bytes = 8;
    for (const auto& [name, value] : rare.xattrs)
        bytes += 16 + divide_up(name.size(), 4) * 4 + divide_up(value.size(), 4) * 4;
    return plan.inode_size >= 160 + bytes;
}

class Counter {
public:
    Counter(const Volume& volume, const Plan& plan) : volume_(volume), plan_(plan) {}

    Result<ExtNeeds> count() {
        needs_.inodes = EXT2_GOOD_OLD_FIRST_INO;
        TRY_VOID(count_name(volume_.tree.root()));
        needs_.blocks += 1;  // the resize inode's
        return needs_;
    }

private:
    /// Counts what one more name leads to.
    Result<void> count_name(TreeInode& inode) {
        ++needs_.files;
        if (inode.links++ == 0) TRY_VOID(count(inode));
        if (!inode.is_directory()) return {};
        for (const auto& [name, child] : inode.children->entries()) {
            if (auto counted = count_name(*child); !counted) return failed(std::move(counted).error(), name.text());
        }
        auto blocks = blocks_of_directory(*inode.children, plan_.shape());
        if (&inode == &volume_.tree.root()) blocks += divide_up(lost_found_bytes, plan_.block_size);
        add_blocks({{{.start = 0, .length = blocks}}});
        return {};
    }

    Result<void> count(const TreeInode& inode) {
        ++needs_.inodes;
        if (inode.rare) {
            if (!inode.rare->xattrs.empty() && !fits_in_inode(plan_, *inode.rare)) needs_.blocks += 1;
            if (S_ISLNK(inode.mode) && inode.rare->target.size() >= 60) needs_.blocks += 1;
            if (S_ISLNK(inode.mode) && inode.rare->target.size() >= plan_.block_size)
                return refuse_file("the target of the symbolic link is longer than a block");
        }
        if (S_ISLNK(inode.mode) && (!inode.rare || inode.rare->target.empty()))
            return refuse_file("the symbolic link has no target");
        if (!S_ISREG(inode.mode)) return {};
        if (inode.size / plan_.block_size >= largest_file_blocks(plan_.extents(), plan_.block_size))
            return refuse_file("the file is larger than this file system can hold");
        add_blocks(block_runs(inode, plan_.block_size));
        return {};
    }

    /// What the blocks take, and what leads to them.
    void add_blocks(std::span<const DataRun> runs) {
        for (const auto& run : runs) needs_.blocks += run.length;
        needs_.blocks +=
            plan_.extents() ? extent_blocks_at_most(runs, plan_.block_size) : indirect_blocks(runs, plan_.block_size);
    }

    const Volume& volume_;
    const Plan& plan_;
    ExtNeeds needs_;
};

void forget_links(TreeInode& inode) {
    inode.links = 0;
    inode.number = 0;
    if (!inode.is_directory()) return;
    for (const auto& entry : inode.children->entries()) forget_links(*entry.inode);
}

Result<ExtNeeds> needs_of(const Volume& volume, const Plan& plan) {
    auto& root = volume.tree.root();
    auto& place = volume.tree.place_in(root, lost_found).inode;
    if (place == nullptr) {
        place = &volume.tree.new_inode(S_IFDIR | 0700);
        place->mtime = volume.time;
    }
    if (!place->is_directory()) return volume.refuse("source", "/lost+found is no directory, as ext requires");
    forget_links(root);
    auto needs = Counter(volume, plan).count();
    return needs ? needs : failed_tree(volume, std::move(needs).error());
}

std::uint64_t inodes_for(const Plan& plan, const ExtNeeds& needs, std::uint64_t blocks) {
    if (plan.inodes) return *plan.inodes;
    constexpr std::uint64_t most = 0xfffffff0;
    return std::max(needs.inodes + needs.inodes / 16 + 16, std::min(blocks * plan.block_size / bytes_per_inode, most));
}

/// Begins a file system of this many blocks. Nothing is written.
Result<ext2_filsys> begin(ExtIo& io, const Volume& volume, const Plan& plan, const ExtNeeds& needs,
                          std::uint64_t blocks) {
    constexpr std::uint64_t most_blocks = 0xffffffff;
    if (blocks > most_blocks) {
        return volume.refuse(
            "size", fmt::format("ext is made with at most 2^32 - 1 blocks, of {} bytes here", plan.block_size));
    }
    auto super = plan.super;
    super.s_rev_level = EXT2_DYNAMIC_REV;
    super.s_log_block_size = static_cast<std::uint32_t>(std::countr_zero(plan.block_size / 1024));
    super.s_log_cluster_size = super.s_log_block_size;
    super.s_inode_size = static_cast<std::uint16_t>(plan.inode_size);
    ext2fs_blocks_count_set(&super, blocks);
    const auto inodes = inodes_for(plan, needs, blocks);
    if (inodes > 0xffffffff || inodes < needs.inodes) {
        return volume.refuse("options.inodes",
                             fmt::format("the tree has {} files, and there are {} inodes", needs.inodes, inodes));
    }
    super.s_inodes_count = static_cast<std::uint32_t>(inodes);
    ext2fs_r_blocks_count_set(&super, blocks / 100 * plan.reserved_percent);
    if (plan.has(&ext2_super_block::s_feature_incompat, EXT4_FEATURE_INCOMPAT_64BIT))
        super.s_desc_size = EXT2_MIN_DESC_SIZE_64BIT;
    if (plan.has(&ext2_super_block::s_feature_incompat, EXT4_FEATURE_INCOMPAT_FLEX_BG)) super.s_log_groups_per_flex = 4;
    if (journal_blocks(plan, blocks) == 0) super.s_feature_compat &= ~EXT3_FEATURE_COMPAT_HAS_JOURNAL;
    super.s_errors = EXT2_ERRORS_DEFAULT;
    auto begun = io.initialize(EXT2_FLAG_EXCLUSIVE, super);
    if (!begun && (begun.error().code == Errc::no_space || begun.error().code == Errc::corrupt)) {
        return fail(Errc::no_space, volume.name,
                    fmt::format("No space: {} bytes have no room for the tables of ext with {} inodes",
                                blocks * plan.block_size, inodes));
    }
    return begun;
}

/// The blocks that files can take in a file system that has begun.
std::uint64_t room(ext2_filsys fs, const Plan& plan) {
    std::uint64_t free = ext2fs_free_blocks_count(fs->super);
    // With flexible groups, libext2fs takes the tables off when it places them.
    if (ext2fs_has_feature_flex_bg(fs->super))
        free -= std::min<std::uint64_t>(free, std::uint64_t{fs->group_desc_count} * (fs->inode_blocks_per_group + 2));
    const auto journal = journal_blocks(plan, ext2fs_blocks_count(fs->super));
    const auto journal_tables = journal == 0 || plan.extents() ? 0 : 8 + journal / 64;
    return free - std::min<std::uint64_t>(free, journal + journal_tables);
}

struct CloseFilesystem {
    void operator()(ext2_filsys fs) const { ext2fs_free(fs); }
};
using Filesystem = std::unique_ptr<struct_ext2_filsys, CloseFilesystem>;

class ExtWriter {
public:
    ExtWriter(const Volume& volume, const Plan& plan, PlannedDisk& disk, std::uint64_t offset, std::uint64_t size)
        : volume_(volume),
          plan_(plan),
          disk_(disk),
          offset_(offset),
          window_(disk, offset, size),
          io_(window_),
          blocks_(size / plan.block_size) {}

    Result<Filled> run(const ExtNeeds& needs) {
        fs_.reset(TRY(begin(io_, volume_, plan_, needs, blocks_)));
        if (room(fs(), plan_) < needs.blocks) {
            return does_not_fit(volume_, needs.blocks * plan_.block_size, room(fs(), plan_) * plan_.block_size);
        }
        block_size_ = plan_.block_size;
        TRY_VOID(make_empty());
        number(volume_.tree.root(), EXT2_ROOT_INO);
        if (auto written = write_directory(volume_.tree.root(), EXT2_ROOT_INO); !written)
            return failed_tree(volume_, std::move(written).error());
        Filled filled{.files = needs.files, .free = ext2fs_free_blocks_count(fs()->super) * block_size_};
        ext2fs_set_gdt_csum(fs());
        ext2fs_mark_super_dirty(fs());
        ext2_filsys closing = fs_.release();
        const auto code = ext2fs_close_free(&closing);
        if (code != 0 && closing != nullptr) fs_.reset(closing);
        TRY_VOID(io_.verify(code, volume_.name));
        return filled;
    }

private:
    [[nodiscard]] ext2_filsys fs() const { return fs_.get(); }
    [[nodiscard]] Result<void> ok(errcode_t code) { return io_.verify(code, volume_.name); }

    /// The file system without files.
    Result<void> make_empty() {
        auto* super = fs()->super;
        // libext2fs takes 0 for "ask the clock".
        fs()->now = std::clamp<time_t>(volume_.time, 1, 0xffffffff);
        if (plan_.checksums()) super->s_checksum_type = EXT2_CRC32C_CHKSUM;
        super->s_mkfs_time = super->s_lastcheck = static_cast<std::uint32_t>(fs()->now);
        super->s_wtime = super->s_mkfs_time;
        std::memcpy(super->s_uuid, volume_.uuid.data(), sizeof super->s_uuid);
        std::memcpy(super->s_hash_seed, volume_.hash_seed.data(), sizeof super->s_hash_seed);
        std::memcpy(super->s_volume_name, volume_.spec.label.data(), volume_.spec.label.size());
        super->s_def_hash_version = EXT2_HASH_HALF_MD4;
        // libext2fs sets the flag of this machine's characters.
        super->s_flags &= ~static_cast<std::uint32_t>(EXT2_FLAGS_SIGNED_HASH);
        super->s_flags |= EXT2_FLAGS_UNSIGNED_HASH;
        super->s_default_mount_opts = EXT2_DEFM_XATTR_USER | EXT2_DEFM_ACL;
        super->s_max_mnt_count = -1;
        super->s_checkinterval = 0;
        if (plan_.inode_size > least_inode_size) {
            super->s_min_extra_isize = super->s_want_extra_isize = sizeof(ext2_inode_large) - EXT2_GOOD_OLD_INODE_SIZE;
        }
        if (plan_.has(&ext2_super_block::s_feature_incompat, EXT4_FEATURE_INCOMPAT_CSUM_SEED))
            super->s_checksum_seed = ext2fs_crc32c_le(~0U, super->s_uuid, sizeof super->s_uuid);
        ext2fs_init_csum_seed(fs());
        TRY_VOID(ok(ext2fs_allocate_tables(fs())));
        if (ext2fs_has_group_desc_csum(fs())) {
            for (dgrp_t group = 0; group < fs()->group_desc_count; ++group)
                ext2fs_bg_flags_set(fs(), group, EXT2_BG_INODE_ZEROED);
        }
        for (ext2_ino_t i = 1; i < EXT2_GOOD_OLD_FIRST_INO; ++i)
            ext2fs_inode_alloc_stats2(fs(), i, +1, i == EXT2_ROOT_INO ? 1 : 0);
        next_inode_ = lost_found_number;
        if (ext2fs_has_feature_resize_inode(super)) TRY_VOID(ok(ext2fs_create_resize_inode(fs())));
        if (const auto journal = journal_blocks(plan_, ext2fs_blocks_count(super)); journal != 0) {
            TRY_VOID(ok(ext2fs_add_journal_inode2(fs(), static_cast<blk_t>(journal), ~blk64_t{0},
                                                  EXT2_MKJOURNAL_NO_MNT_CHECK)));
        }
        return {};
    }

    // ---- Numbers ----

    /// Numbers the files of a directory, and of those below, so that each number follows from the tree alone.
    void number(TreeInode& directory, ext2_ino_t own) {
        directory.number = own;
        if (own == EXT2_ROOT_INO) take_number(*directory.children->find(lost_found));
        for (const auto& entry : directory.children->entries()) {
            if (entry.inode->number == 0) take_number(*entry.inode);
        }
        for (const auto& entry : directory.children->entries()) {
            if (entry.inode->is_directory()) number(*entry.inode, entry.inode->number);
        }
    }

    void take_number(TreeInode& inode) {
        ext2fs_inode_alloc_stats2(fs(), next_inode_, +1, inode.is_directory() ? 1 : 0);
        inode.number = next_inode_++;
    }

    // ---- Blocks ----

    Result<std::vector<PhysicalRun>> take(std::uint64_t logical, std::uint64_t count) {
        std::vector<PhysicalRun> runs;
        const auto last = ext2fs_blocks_count(fs()->super) - 1;
        while (count > 0) {
            blk64_t begin = 0;
            blk64_t end = 0;
            if (next_block_ > last ||
                ext2fs_find_first_zero_block_bitmap2(fs()->block_map, next_block_, last, &begin) != 0)
                return fail(Errc::no_space, volume_.name, "the file system is full");
            const auto most = std::min<blk64_t>(begin + count - 1, last);
            if (ext2fs_find_first_set_block_bitmap2(fs()->block_map, begin, most, &end) != 0) end = most + 1;
            const auto length = end - begin;
            ext2fs_block_alloc_stats_range(fs(), begin, static_cast<blk_t>(length), +1);
            runs.push_back({logical, begin, length});
            logical += length;
            count -= length;
            next_block_ = end;
        }
        return runs;
    }

    Result<std::uint64_t> take_one() { return TRY(take(0, 1)).front().physical; }

    Result<void> write_block(std::uint64_t block, const void* bytes) {
        return ok(io_channel_write_blk64(fs()->io, block, 1, bytes));
    }

    /// Leads the inode to the runs. Returns the blocks that this took.
    Result<std::uint64_t> map(ext2_inode_large& inode, ext2_ino_t number, const std::vector<PhysicalRun>& runs) {
        const BlockWriter writer{
            .block_size = plan_.block_size,
            .take = [this] { return take_one(); },
            .write = [this](std::uint64_t block,
                            std::span<const std::byte> bytes) { return write_block(block, bytes.data()); }};
        auto root = std::as_writable_bytes(std::span(inode.i_block));
        if (!plan_.extents()) return write_indirect_blocks(root, runs, writer);
        inode.i_flags |= EXT4_EXTENTS_FL;
        const auto seal = [&](std::span<std::byte> block) {
            return ok(ext2fs_extent_block_csum_set(fs(), number, reinterpret_cast<ext3_extent_header*>(block.data())));
        };
        return write_extents(root, runs, writer, seal);
    }

    // ---- Inodes ----

    ext2_inode_large inode_of(const TreeInode& from) const {
        ext2_inode_large inode = {};
        inode.i_mode = static_cast<std::uint16_t>(from.mode);
        inode.i_uid = static_cast<std::uint16_t>(from.uid);
        inode.i_gid = static_cast<std::uint16_t>(from.gid);
        inode.osd2.linux2.l_i_uid_high = static_cast<std::uint16_t>(from.uid >> 16);
        inode.osd2.linux2.l_i_gid_high = static_cast<std::uint16_t>(from.gid >> 16);
        const auto low = static_cast<std::uint32_t>(from.mtime);
        const auto epoch = (from.mtime - std::int64_t{static_cast<std::int32_t>(low)}) >> 32;
        inode.i_atime = inode.i_ctime = inode.i_mtime = low;
        if (plan_.inode_size > least_inode_size) {
            inode.i_extra_isize = sizeof(ext2_inode_large) - EXT2_GOOD_OLD_INODE_SIZE;
            inode.i_crtime = low;
            inode.i_atime_extra = inode.i_ctime_extra = inode.i_mtime_extra = inode.i_crtime_extra =
                from.nanoseconds << 2 | (static_cast<std::uint32_t>(epoch) & 3);
        }
        inode.i_links_count = static_cast<std::uint16_t>(from.links);
        return inode;
    }

    Result<void> write_inode(const TreeInode& from, ext2_inode_large& inode, std::uint64_t blocks) {
        TRY_VOID(ok(ext2fs_iblk_set(fs(), reinterpret_cast<ext2_inode*>(&inode), blocks)));
        TRY_VOID(ok(ext2fs_write_inode_full(fs(), from.number, reinterpret_cast<ext2_inode*>(&inode),
                                            std::min<int>(sizeof inode, static_cast<int>(plan_.inode_size)))));
        if (!from.rare || from.rare->xattrs.empty()) return {};
        ext2_xattr_handle* handle = nullptr;
        TRY_VOID(ok(ext2fs_xattrs_open(fs(), from.number, &handle)));
        const std::unique_ptr<ext2_xattr_handle, void (*)(ext2_xattr_handle*)> closing(
            handle, [](ext2_xattr_handle* opened) { ext2fs_xattrs_close(&opened); });
        for (const auto& [name, value] : from.rare->xattrs) {
            const auto code = ext2fs_xattr_set(handle, name.c_str(), value.data(), value.size());
            if (code == EXT2_ET_EA_NO_SPACE) {
                return refuse_file(fmt::format("the attributes of a file fit in a block; {} has {} bytes",
                                               printable(name), value.size()));
            }
            TRY_VOID(ok(code));
        }
        return ok(ext2fs_xattrs_write(handle));
    }

    Result<void> write_directory(const TreeInode& from, ext2_ino_t parent) {
        const auto contents = Directory(*from.children, from.number, parent).blocks(plan_.shape(), hash());
        if (!contents) return refuse_file("the directory has too many files");
        auto inode = inode_of(from);
        std::uint64_t subdirectories = 0;
        for (const auto& entry : from.children->entries()) subdirectories += entry.inode->is_directory() ? 1 : 0;
        const bool countless = plan_.has(&ext2_super_block::s_feature_ro_compat, EXT4_FEATURE_RO_COMPAT_DIR_NLINK);
        if (subdirectories + 2 > most_links && !countless) {
            return refuse_file(
                fmt::format("the directory has {} subdirectories; without dir_nlink it holds 64998", subdirectories));
        }
        // With more subdirectories than a link count can say, the count is 1.
        inode.i_links_count = static_cast<std::uint16_t>(subdirectories + 2 > most_links ? 1 : subdirectories + 2);
        auto count = contents->blocks.size();
        if (from.number == lost_found_number) count = std::max<std::size_t>(count, lost_found_bytes / block_size_);
        const auto runs = TRY(take(0, count));
        const auto tables = TRY(map(inode, from.number, runs));
        TRY_VOID(ok(ext2fs_inode_size_set(fs(), reinterpret_cast<ext2_inode*>(&inode), count * block_size_)));
        if (contents->indexed) inode.i_flags |= EXT2_INDEX_FL;
        TRY_VOID(write_inode(from, inode, count + tables));
        const auto empty = empty_directory_block(plan_.shape());
        for (const auto& run : runs) {
            for (std::uint64_t i = 0; i < run.length; ++i) {
                const auto index = run.logical + i;
                auto block = index < contents->blocks.size() ? contents->blocks[index] : empty;
                TRY_VOID(ok(ext2fs_write_dir_block4(fs(), run.physical + i, block.data(), 0, from.number)));
            }
        }
        for (const auto& [name, child] : from.children->entries()) {
            if (child->is_directory()) continue;
            if (auto written = write_file(*child); !written) return failed(std::move(written).error(), name.text());
        }
        for (const auto& [name, child] : from.children->entries()) {
            if (!child->is_directory()) continue;
            if (auto written = write_directory(*child, from.number); !written)
                return failed(std::move(written).error(), name.text());
        }
        return {};
    }

    /// Writes an inode that is no directory, once.
    Result<void> write_file(const TreeInode& from) {
        if (from.links > 1 && !written_links_.insert(from.number).second) return {};
        if (from.links > most_links) return refuse_file("the file has more than 65000 hard links");
        auto inode = inode_of(from);
        std::uint64_t blocks = 0;
        if (S_ISLNK(from.mode)) {
            blocks = TRY(write_symlink(from, inode));
        } else if (S_ISREG(from.mode)) {
            blocks = TRY(write_contents(from, inode));
        } else if (S_ISCHR(from.mode) || S_ISBLK(from.mode)) {
            const auto major = from.rare ? from.rare->major : 0;
            const auto minor = from.rare ? from.rare->minor : 0;
            if (major < 256 && minor < 256) {
                inode.i_block[0] = major << 8 | minor;
            } else {
                inode.i_block[1] = (minor & 0xff) | major << 8 | (minor & ~0xffU) << 12;
            }
        }
        return write_inode(from, inode, blocks);
    }

    Result<std::uint64_t> write_symlink(const TreeInode& from, ext2_inode_large& inode) {
        const auto& target = from.rare->target;
        TRY_VOID(ok(ext2fs_inode_size_set(fs(), reinterpret_cast<ext2_inode*>(&inode), target.size())));
        if (target.size() < sizeof inode.i_block) {
            std::memcpy(inode.i_block, target.data(), target.size());
            return 0;
        }
        const auto runs = TRY(take(0, 1));
        std::vector<std::byte> block(plan_.block_size);
        std::memcpy(block.data(), target.data(), target.size());
        TRY_VOID(write_block(runs.front().physical, block.data()));
        return 1 + TRY(map(inode, from.number, runs));
    }

    Result<std::uint64_t> write_contents(const TreeInode& from, ext2_inode_large& inode) {
        std::vector<PhysicalRun> all;
        std::uint64_t blocks = 0;
        for (const auto& [start, length] : block_runs(from, plan_.block_size)) {
            for (const auto& run : TRY(take(start, length))) {
                const auto at = run.logical * block_size_;
                disk_.place({offset_ + run.physical * block_size_}, std::min(run.length * block_size_, from.size - at),
                            *from.content, at);
                all.push_back(run);
            }
            blocks += length;
        }
        TRY_VOID(ok(ext2fs_inode_size_set(fs(), reinterpret_cast<ext2_inode*>(&inode), from.size)));
        return blocks + TRY(map(inode, from.number, all));
    }

    [[nodiscard]] NameHash hash() const {
        return [this](std::string_view name) {
            std::pair<std::uint32_t, std::uint32_t> result;
            ext2fs_dirhash2(EXT2_HASH_HALF_MD4_UNSIGNED, name.data(), static_cast<int>(name.size()), nullptr, 0,
                            fs()->super->s_hash_seed, &result.first, &result.second);
            return result;
        };
    }

    const Volume& volume_;
    const Plan& plan_;
    PlannedDisk& disk_;
    std::uint64_t offset_;
    DiskWindow window_;
    ExtIo io_;
    Filesystem fs_;
    std::uint64_t blocks_;
    std::uint64_t block_size_ = 0;
    std::uint64_t next_block_ = 1;
    ext2_ino_t next_inode_ = 0;
    std::unordered_set<ext2_ino_t> written_links_;  // of the files with several names
};

}  // namespace

Result<std::uint64_t> fitted_ext(const Volume& volume) {
    const auto plan = TRY(plan_of(volume));
    const auto needs = TRY(needs_of(volume, plan));
    const auto used = needs.blocks + needs.blocks * volume.spec.free_percent / 100;
    const auto wanted = used + divide_up(volume.spec.free_bytes, plan.block_size);
    auto blocks = std::max<std::uint64_t>(wanted + wanted / 50, 64 * KiB / plan.block_size);
    if (plan.journal()) blocks += plan.journal_blocks.value_or(1024);
    const std::uint64_t unit = std::max<std::uint64_t>(4096 / plan.block_size, 1);
    constexpr unsigned most_tries = 100;
    for (unsigned i = 0; i < most_tries; ++i) {
        blocks = divide_up(blocks, unit) * unit;
        PlannedDisk disk(blocks * plan.block_size);
        ExtIo io(disk);
        auto begun = begin(io, volume, plan, needs, blocks);
        if (!begun && begun.error().code == Errc::invalid_argument) return std::unexpected(std::move(begun).error());
        if (!begun) {
            blocks += blocks / 8 + unit;  // there are more inodes than so many blocks can have
            continue;
        }
        const Filesystem fs(*begun);
        // libext2fs leaves out a last group that is too small for its own tables.
        const auto there = ext2fs_blocks_count(fs->super);
        const auto free = room(fs.get(), plan);
        const bool journal_fits = !plan.journal() || journal_blocks(plan, there) != 0;
        if (free >= wanted && journal_fits) return there * plan.block_size;
        if (!journal_fits) blocks = std::max(blocks, least_with_journal - unit);
        blocks += std::max(wanted - std::min(free, wanted), unit);
    }
    return volume.refuse("size", "no size was found that fits the tree; give a size");
}

Result<TimeRange> times_of_ext(const Volume& volume) {
    const auto plan = TRY(plan_of(volume));
    return TimeRange{-0x80000000LL, plan.inode_size == least_inode_size ? 0x7fffffffLL : 0x37fffffffLL};
}

Result<Filled> write_ext(const Volume& volume, PlannedDisk& disk, std::uint64_t offset, std::uint64_t size) {
    const auto plan = TRY(plan_of(volume));
    const auto needs = TRY(needs_of(volume, plan));
    return ExtWriter(volume, plan, disk, offset, size).run(needs);
}

}  // namespace qcow
