// ext2, ext3 and ext4 by libext2fs. The library makes the file system, its tables, journal and attributes. Directories,
// extents and indirect blocks are written here: their contents are known from the start, so each block is written once,
// and the time is linear in the number of files.

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "build/ext_plan.h"
#include "qcow/text.h"

namespace qcow {
namespace {

constexpr ext2_ino_t lost_found_number = 11;
constexpr std::uint32_t most_links = 65000;

class ExtWriter {
public:
    ExtWriter(const Volume& volume, const ExtPlan& plan, PlannedDisk& disk, std::uint64_t offset, std::uint64_t size)
        : volume_(volume),
          plan_(plan),
          disk_(disk),
          offset_(offset),
          window_(disk, offset, size),
          io_(window_),
          blocks_(size / plan.block_size) {}

    Result<Filled> run(const ExtNeeds& needs) {
        fs_.reset(TRY(begin_ext(io_, volume_, plan_, needs, blocks_)));
        if (room_of_ext(fs(), plan_) < needs.blocks) {
            return does_not_fit(volume_, needs.blocks * plan_.block_size, room_of_ext(fs(), plan_) * plan_.block_size);
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
        if (const auto journal = journal_blocks_of_ext(plan_, ext2fs_blocks_count(super)); journal != 0) {
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
            if (auto written = write_file(*child); !written)
                return failed_file(std::move(written).error(), name.text());
        }
        for (const auto& [name, child] : from.children->entries()) {
            if (!child->is_directory()) continue;
            if (auto written = write_directory(*child, from.number); !written)
                return failed_file(std::move(written).error(), name.text());
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
    const ExtPlan& plan_;
    PlannedDisk& disk_;
    std::uint64_t offset_;
    DiskWindow window_;
    ExtIo io_;
    ExtHandle fs_;
    std::uint64_t blocks_;
    std::uint64_t block_size_ = 0;
    std::uint64_t next_block_ = 1;
    ext2_ino_t next_inode_ = 0;
    std::unordered_set<ext2_ino_t> written_links_;  // of the files with several names
};

}  // namespace
Result<Filled> write_ext(const Volume& volume, PlannedDisk& disk, std::uint64_t offset, std::uint64_t size) {
    const auto plan = TRY(plan_of_ext(volume));
    const auto needs = TRY(needs_of_ext(volume, plan));
    return ExtWriter(volume, plan, disk, offset, size).run(needs);
}

}  // namespace qcow
