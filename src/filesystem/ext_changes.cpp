// Changes ext file systems in place.

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <memory>

#include "base/bits.h"
#include "filesystem/ext.h"
#include "filesystem/readers.h"

namespace qcow {
namespace {

int entry_of_type(FileType type) {
    switch (type) {
        case FileType::regular: return EXT2_FT_REG_FILE;
        case FileType::directory: return EXT2_FT_DIR;
        case FileType::symbolic_link: return EXT2_FT_SYMLINK;
        case FileType::character_device: return EXT2_FT_CHRDEV;
        case FileType::block_device: return EXT2_FT_BLKDEV;
        case FileType::fifo: return EXT2_FT_FIFO;
        case FileType::socket: return EXT2_FT_SOCK;
        case FileType::unknown: break;
    }
    return EXT2_FT_UNKNOWN;
}

/// Nothing is stored without a time. One out of range becomes the nearest that there is.
void store_time(const std::optional<Timestamp>& time, std::uint32_t& seconds, std::uint32_t* extra) {
    if (!time) return;
    constexpr std::int64_t least = std::numeric_limits<std::int32_t>::min();
    const std::int64_t most =
        extra == nullptr ? std::numeric_limits<std::int32_t>::max() : least + (std::int64_t{1} << 34) - 1;
    const auto stored = std::clamp(time->seconds, least, most);
    seconds = static_cast<std::uint32_t>(stored);
    const auto epoch = static_cast<std::uint32_t>((stored - static_cast<std::int32_t>(seconds)) >> 32);
    if (extra != nullptr) *extra = (time->nanoseconds << 2) | (epoch & 3);
}

/// Frees the cluster of a block. Returns false if another block of it did so before.
bool release_block(ext2_filsys fs, blk64_t block) {
    if (ext2fs_test_block_bitmap2(fs->block_map, block) == 0) return false;
    ext2fs_block_alloc_stats2(fs, block, -1);
    return true;
}

class ExtChanges final : public ExtFiles {
public:
    using ExtFiles::ExtFiles;

    Result<void> open(const Content& content) {
        TRY_VOID(ExtFiles::open(content, EXT2_FLAG_RW));
        if (ext2fs_has_feature_journal_needs_recovery(fs_->super)) {
            return fail(Errc::unsupported, type_,
                        "its journal must be replayed before it can be changed; mount it once, or run e2fsck on it");
        }
        if ((fs_->super->s_state & EXT2_ERROR_FS) != 0)
            return fail(Errc::corrupt, type_, "it is marked as damaged; run e2fsck before it is changed");
        if ((fs_->super->s_state & EXT2_VALID_FS) == 0 || ext2fs_has_feature_orphan_present(fs_->super)) {
            return fail(Errc::unsupported, type_,
                        "it is mounted, or was not unmounted; unmount it, or run e2fsck before it is changed");
        }
        if (const auto feature = unsupported_feature(); !feature.empty()) {
            return fail(Errc::unsupported, type_,
                        fmt::format("it has the feature \"{}\", with which it can only be read", feature));
        }
        TRY_VOID(verify(ext2fs_read_bitmaps(fs_), "bitmaps"));
        return order_writes();
    }

protected:
    Result<Inode> do_create(Inode directory, const std::string& name, const NewNode& node) override {
        return change([&] { return with_space([&] { return create_node(directory, name, node); }); });
    }

    Result<void> do_write(Inode inode, std::uint64_t at, std::span<const std::byte> from) override {
        return change([&] { return with_space([&] { return write_data(inode, at, from); }); });
    }

    Result<void> do_truncate(Inode inode, std::uint64_t size) override {
        return change([&] { return set_size(inode, size); });
    }

    Result<void> do_remove(Inode directory, const std::string& name) override {
        return change([&] { return remove_name(directory, name); });
    }

    Result<void> do_replace(Inode directory, const DirectoryEntry& from, const DirectoryEntry& to) override {
        return change([&] { return replace_file(directory, from, to); });
    }

    Result<void> do_close() override {
        forget_file();
        auto freed = free_lost();
        ext2_filsys closed = std::exchange(fs_, nullptr);
        // libext2fs writes the superblock after everything else is durable.
        if (changed_ && sound_ && freed && !io_.failed()) set_clean(*closed, true);
        auto ended = io_.verify(ext2fs_close_free(&closed), type_);
        return freed ? ended : freed;
    }

private:
    /// Makes a change. If it fails halfway, the file system stays marked as not clean. What fails for lack of space
    /// leaves nothing halfway.
    template <class Work>
    std::invoke_result_t<Work> change(Work&& work) {
        begun_ = false;
        auto done = work();
        if (!done && begun_ && done.error().code != Errc::no_space) sound_ = false;
        return done;
    }

    /// Refuses what is of another type, what was removed, and what belongs to the file system itself.
    Result<void> expect_changeable(Inode inode, FileType type) {
        const auto large = TRY(load(inode));
        if (inode != root()) TRY_VOID(refuse_own(inode));
        if (reinterpret_cast<const ext2_inode&>(large).i_links_count == 0 || lost_.contains(inode))
            return fail(Errc::not_found, inode_place(inode), "this file was removed");
        return expect(inode, type);
    }

    /// Refuses what belongs to the file system itself.
    [[nodiscard]] Result<void> refuse_own(Inode inode) const {
        if (inode >= EXT2_FIRST_INODE(fs_->super)) return {};
        return fail(Errc::invalid_argument, inode_place(inode), "this belongs to the file system itself");
    }

    Result<void> set_size(Inode inode, std::uint64_t size) {
        TRY_VOID(expect_changeable(inode, FileType::regular));
        TRY_VOID(begin_change());
        forget_file();
        loaded_ = 0;
        TRY_VOID(free_extents(inode, divide_up(size, std::uint64_t{fs_->blocksize})));
        loaded_ = 0;
        auto* const file = TRY(opened_file(inode));
        return verify(ext2fs_file_set_size2(file, static_cast<ext2_off64_t>(size)), inode_place(inode));
    }

    /// Frees the blocks of a file with extents from `first` on. Not by ext2fs_punch: it refuses to free the last block
    /// of a file system.
    Result<void> free_extents(Inode inode, blk64_t first) {
        const auto place = inode_place(inode);
        auto large = TRY(load(inode));
        auto& raw = reinterpret_cast<ext2_inode&>(large);
        if ((raw.i_flags & EXT4_EXTENTS_FL) == 0) return {};
        ext2_extent_handle_t handle = nullptr;
        TRY_VOID(verify(ext2fs_extent_open2(fs_, number(inode), &raw, &handle), place));
        const std::unique_ptr<ext2_extent_handle, void (*)(ext2_extent_handle_t)> owner(handle, ext2fs_extent_free);
        std::vector<std::pair<blk64_t, blk64_t>> freed;  // the first block, and how many
        while (true) {
            ext2fs_extent extent = {};
            auto code = ext2fs_extent_get(handle, EXT2_EXTENT_ROOT, &extent);
            if (code == 0) code = ext2fs_extent_get(handle, EXT2_EXTENT_LAST_LEAF, &extent);
            if (code == EXT2_ET_EXTENT_NO_NEXT || code == EXT2_ET_NO_CURRENT_NODE) break;
            TRY_VOID(verify(code, place));
            if (extent.e_lblk + extent.e_len <= first) break;
            const auto kept = first - std::min<blk64_t>(first, extent.e_lblk);
            const auto count = extent.e_len - kept;
            if (!lies_within(extent.e_pblk, extent.e_len, ext2fs_blocks_count(fs_->super)))
                return fail(Errc::corrupt, place, "an extent lies past the end of the file system");
            freed.emplace_back(extent.e_pblk + kept, count);
            extent.e_len = static_cast<std::uint32_t>(kept);
            TRY_VOID(
                verify(kept == 0 ? ext2fs_extent_delete(handle, 0) : ext2fs_extent_replace(handle, 0, &extent), place));
        }
        return release(inode, raw, first, freed);
    }

    /// Frees blocks that a file had from `first` on. What is in front of it may be in the same cluster.
    Result<void> release(Inode inode, ext2_inode& raw, blk64_t first,
                         const std::vector<std::pair<blk64_t, blk64_t>>& freed) {
        if (freed.empty()) return {};
        const auto place = inode_place(inode);
        const blk64_t ratio = EXT2FS_CLUSTER_RATIO(fs_);
        blk64_t kept = 0;
        if (ratio > 1) TRY_VOID(verify(ext2fs_map_cluster_block(fs_, number(inode), &raw, first, &kept), place));
        blk64_t clusters = 0;
        for (const auto& [start, count] : freed) {
            for (auto block = start; block < start + count; ++block) {
                if (kept != 0 && block / ratio == kept / ratio) continue;
                if (release_block(fs_, block)) ++clusters;
            }
        }
        TRY_VOID(verify(ext2fs_iblk_sub_blocks(fs_, &raw, clusters), place));
        return verify(ext2fs_write_inode(fs_, number(inode), &raw), place);
    }

    Result<void> remove_name(Inode directory, const std::string& name) {
        forget_file();
        loaded_ = 0;
        TRY_VOID(expect_changeable(directory, FileType::directory));
        const auto inode = number(TRY(find(directory, name)));
        TRY_VOID(refuse_own(inode));
        const auto large = TRY(load(inode));
        const bool is_directory = LINUX_S_ISDIR(reinterpret_cast<const ext2_inode&>(large).i_mode);
        std::vector<Error> refused;
        if (is_directory && (!TRY(do_list(inode, false, refused)).empty() || !refused.empty())) {
            return fail(Errc::invalid_argument, name, "the directory is not empty");
        }
        TRY_VOID(begin_change());
        loaded_ = 0;
        TRY_VOID(verify(ext2fs_unlink(fs_, number(directory), name.c_str(), inode, 0), name));
        if (is_directory) {
            ext2_inode above = {};
            TRY_VOID(verify(ext2fs_read_inode(fs_, number(directory), &above), inode_place(directory)));
            if (above.i_links_count > 2) --above.i_links_count;  // 1: more than can be counted
            TRY_VOID(verify(ext2fs_write_inode(fs_, number(directory), &above), inode_place(directory)));
        }
        return lose_name(inode, name);
    }

    Result<void> replace_file(Inode directory, const DirectoryEntry& from, const DirectoryEntry& to) {
        forget_file();
        loaded_ = 0;
        TRY_VOID(expect_changeable(directory, FileType::directory));
        TRY_VOID(refuse_own(from.inode));
        TRY_VOID(refuse_own(to.inode));
        TRY_VOID(begin_change());
        // The entry stays where it is, so there is always room for it.
        struct Change {
            const std::string& name;
            ext2_ino_t inode;
            int type;
            bool done = false;
        } change{to.name, number(from.inode), 0};
        if (ext2fs_has_feature_filetype(fs_->super)) change.type = entry_of_type(from.type);
        const auto change_entry = [](ext2_ino_t, int kind, ext2_dir_entry* raw, int, int, char*, void* data) -> int {
            auto& with = *static_cast<Change*>(data);
            const auto length = static_cast<std::size_t>(ext2fs_dirent_name_len(raw));
            if (kind != DIRENT_OTHER_FILE || std::string_view(raw->name, length) != with.name) return 0;
            raw->inode = with.inode;
            ext2fs_dirent_set_file_type(raw, with.type);
            with.done = true;
            return DIRENT_CHANGED | DIRENT_ABORT;
        };
        TRY_VOID(verify(ext2fs_dir_iterate2(fs_, number(directory), 0, nullptr, change_entry, &change), to.name));
        if (!change.done) return fail(Errc::corrupt, to.name, "its entry cannot be found in the directory");
        loaded_ = 0;
        const auto& name = from.name;
        TRY_VOID(verify(ext2fs_unlink(fs_, number(directory), name.c_str(), number(from.inode), 0), name));
        return lose_name(to.inode, to.name);
    }

    static void set_clean(struct_ext2_filsys& fs, bool clean) {
        if (clean) {
            fs.super->s_state |= EXT2_VALID_FS;
        } else {
            fs.super->s_state &= static_cast<std::uint16_t>(~EXT2_VALID_FS);
        }
        ext2fs_mark_super_dirty(&fs);
    }

    /// Marks the file system as not clean, durably, before its first change. A process that dies meanwhile leaves work
    /// for e2fsck, as one does that has it mounted.
    Result<void> begin_change() {
        begun_ = true;
        if (changed_) return {};
        set_clean(*fs_, false);
        const int flags = fs_->flags;
        fs_->flags |= EXT2_FLAG_SUPER_ONLY;
        const auto code = ext2fs_flush(fs_);
        fs_->flags = flags;
        TRY_VOID(verify(code, "superblock"));
        changed_ = true;
        return {};
    }

    /// A feature that changes would have to take care of, and do not.
    [[nodiscard]] std::string_view unsupported_feature() const {
        if (ext2fs_has_feature_quota(fs_->super)) return "quota";
        if (ext2fs_has_feature_ea_inode(fs_->super)) return "ea_inode";
        if (ext2fs_has_feature_shared_blocks(fs_->super)) return "shared_blocks";
        if (ext2fs_has_feature_mmp(fs_->super)) return "mmp";
        return {};
    }

    /// Does work, and once more if it lacks space that files without a name have.
    template <class Work>
    std::invoke_result_t<Work> with_space(Work&& work) {
        auto done = work();
        if (done || done.error().code != Errc::no_space || lost_.empty()) return done;
        TRY_VOID(free_lost());
        return work();
    }

    Result<Inode> create_node(Inode directory, const std::string& name, const NewNode& node) {
        TRY_VOID(expect_changeable(directory, FileType::directory));
        const auto above = TRY(load(directory));
        if ((reinterpret_cast<const ext2_inode&>(above).i_flags & EXT4_ENCRYPT_FL) != 0)
            return fail(Errc::encrypted, name, "the directory is encrypted (fscrypt), and takes no new files");
        if (name.size() > EXT2_NAME_LEN)
            return fail(Errc::invalid_argument, name, fmt::format("names in ext have at most {} bytes", EXT2_NAME_LEN));
        if (node.link_target.size() >= fs_->blocksize) {
            return fail(Errc::invalid_argument, name,
                        fmt::format("targets of links have less than {} bytes here", fs_->blocksize));
        }
        if (node.info.major > most_major || node.info.minor > most_minor)
            return fail(Errc::invalid_argument, name, "ext cannot store such a device number");
        ext2_ino_t taken = 0;
        if (ext2fs_lookup(fs_, number(directory), name.data(), static_cast<int>(name.size()), nullptr, &taken) == 0)
            return fail(Errc::invalid_argument, name, "something with this name exists");
        TRY_VOID(begin_change());
        ext2_ino_t made = 0;
        const auto mode = mode_of_type(node.info.type) | (node.info.mode & 07777U);
        TRY_VOID(verify(ext2fs_new_inode(fs_, number(directory), static_cast<int>(mode), nullptr, &made), name));
        // The name comes first: it may need a block that is not there.
        loaded_ = 0;
        TRY_VOID(verify(link(number(directory), name, made, entry_of_type(node.info.type)), name));
        if (auto done = make_node(directory, made, node, mode, name); !done) {
            TRY_VOID(verify(ext2fs_unlink(fs_, number(directory), name.c_str(), made, 0), name));
            return std::unexpected(std::move(done).error());
        }
        auto done = set_attributes(made, node);
        if (done) done = set_info(made, node.info, mode);
        if (done) return made;
        TRY_VOID(remove_name(directory, name));
        TRY_VOID(free_lost());
        return std::unexpected(std::move(done).error());
    }

    Result<void> write_data(Inode inode, std::uint64_t at, std::span<const std::byte> from) {
        TRY_VOID(expect_changeable(inode, FileType::regular));
        TRY_VOID(begin_change());
        loaded_ = 0;  // libext2fs changes the inode, even if it fails
        auto* const file = TRY(opened_file(inode));
        TRY_VOID(verify(ext2fs_file_llseek(file, at, EXT2_SEEK_SET, nullptr), inode_place(inode)));
        while (!from.empty()) {
            unsigned done = 0;
            const auto part = static_cast<unsigned>(std::min<std::size_t>(from.size(), 1 * MiB));
            TRY_VOID(verify(ext2fs_file_write(file, from.data(), part, &done), inode_place(inode)));
            from = from.subspan(done);
        }
        return verify(ext2fs_file_flush(file), inode_place(inode));
    }

    /// Has what an entry or an inode leads to durable before it: first the blocks that were free, then the tables of
    /// inodes, and then all others, such as the directories that there were. So a process that dies takes no file with
    /// it that does not change. (What else it leaves is for e2fsck.)
    Result<void> order_writes() {
        ext2fs_block_bitmap used = nullptr;
        TRY_VOID(verify(ext2fs_copy_bitmap(fs_->block_map, &used), "bitmaps"));
        const std::shared_ptr<std::remove_pointer_t<ext2fs_block_bitmap>> used_before(used, ext2fs_free_block_bitmap);
        const std::uint64_t block_bytes = fs_->blocksize;
        std::map<std::uint64_t, std::uint64_t> tables;  // the block behind each, by its first block
        for (dgrp_t group = 0; group < fs_->group_desc_count; ++group) {
            const std::uint64_t first = ext2fs_inode_table_loc(fs_, group);
            tables[first] = first + fs_->inode_blocks_per_group;
        }
        const std::uint64_t begin = fs_->super->s_first_data_block;
        const std::uint64_t end = ext2fs_blocks_count(fs_->super);
        io_.write_in_stages(3, [used_before, block_bytes, begin, end, tables = std::move(tables)](std::uint64_t at) {
            const std::uint64_t block = at / block_bytes;
            if (block >= begin && block < end && ext2fs_test_block_bitmap2(used_before.get(), block) == 0) return 0U;
            const auto behind = tables.upper_bound(block);
            return behind != tables.begin() && block < std::prev(behind)->second ? 1U : 2U;
        });
        return {};
    }

    /// Frees the files that have lost their last name, once it is durable that nothing leads to them. So none of their
    /// blocks is another file's before, and who replaces a file keeps the old one or the new one, whenever it dies.
    Result<void> free_lost() {
        if (lost_.empty()) return {};
        forget_file();
        TRY_VOID(verify(io_channel_flush(fs_->io), type_));
        for (const auto& [inode, name] : std::exchange(lost_, {})) TRY_VOID(free_inode(inode, name));
        lost_bytes_ = 0;
        return {};
    }

    /// Counts a name less. `name` is for messages.
    Result<void> lose_name(Inode lost, const std::string& name) {
        const auto inode = number(lost);
        auto large = TRY(load(lost));
        auto& raw = *reinterpret_cast<ext2_inode*>(&large);
        const bool is_directory = LINUX_S_ISDIR(raw.i_mode);
        if (is_directory) {
            raw.i_links_count = 0;
        } else if (raw.i_links_count > 0) {
            --raw.i_links_count;
        }
        if (raw.i_links_count > 0) return write_inode(inode, large);
        lost_.emplace(lost, name);
        lost_bytes_ += EXT2_I_SIZE(&raw);
        return lost_.size() < most_lost && lost_bytes_ < most_lost_bytes ? Result<void>() : free_lost();
    }

    /// Frees an inode and its blocks.
    Result<void> free_inode(Inode lost, const std::string& name) {
        const auto inode = number(lost);
        loaded_ = 0;
        auto large = TRY(load(lost));
        auto& raw = *reinterpret_cast<ext2_inode*>(&large);
        const bool is_directory = LINUX_S_ISDIR(raw.i_mode);
        raw.i_links_count = 0;
        raw.i_dtime = static_cast<std::uint32_t>(fs_->now != 0 ? fs_->now : time(nullptr));
        TRY_VOID(write_inode(inode, large));
        const auto freed = ext2fs_free_ext_attr(fs_, inode, &large);
        if (freed != EXT2_ET_EA_NO_SPACE) TRY_VOID(verify(freed, name));
        TRY_VOID(write_inode(inode, large));
        if (ext2fs_inode_has_valid_blocks2(fs_, &raw) != 0) {
            // Not ext2fs_punch: it refuses to free the last block of a file system.
            const auto release = [](ext2_filsys fs, blk64_t* block, e2_blkcnt_t, blk64_t, int, void*) -> int {
                release_block(fs, *block);
                return 0;
            };
            TRY_VOID(verify(ext2fs_block_iterate3(fs_, inode, BLOCK_FLAG_READ_ONLY, nullptr, release, nullptr), name));
        }
        ext2fs_inode_alloc_stats2(fs_, inode, -1, is_directory ? 1 : 0);
        return {};
    }

    Result<void> write_inode(Inode inode, ext2_inode_large& large) {
        loaded_ = 0;
        return verify(
            ext2fs_write_inode_full(fs_, number(inode), reinterpret_cast<ext2_inode*>(&large),
                                    static_cast<int>(std::min<std::size_t>(sizeof large, EXT2_INODE_SIZE(fs_->super)))),
            inode_place(inode));
    }

    errcode_t link(ext2_ino_t directory, const std::string& name, ext2_ino_t inode, int type) {
        auto code = ext2fs_link(fs_, directory, name.c_str(), inode, type);
        if (code != EXT2_ET_DIR_NO_SPACE) return code;
        code = ext2fs_expand_dir(fs_, directory);
        return code != 0 ? code : ext2fs_link(fs_, directory, name.c_str(), inode, type);
    }
    /// Makes the inode that the name leads to.
    Result<void> make_node(Inode directory, ext2_ino_t made, const NewNode& node, std::uint32_t mode,
                           const std::string& name) {
        // Without a name, these do not link.
        if (node.info.type == FileType::directory)
            return verify(ext2fs_mkdir(fs_, number(directory), made, nullptr), name);
        if (node.info.type == FileType::symbolic_link)
            return verify(ext2fs_symlink(fs_, number(directory), made, nullptr, node.link_target.c_str()), name);
        ext2_inode_large fresh = {};
        auto& raw = *reinterpret_cast<ext2_inode*>(&fresh);
        raw.i_mode = static_cast<std::uint16_t>(mode);
        raw.i_links_count = 1;
        fresh.i_extra_isize = sizeof(ext2_inode_large) - EXT2_GOOD_OLD_INODE_SIZE;
        if (node.info.type == FileType::character_device || node.info.type == FileType::block_device) {
            const auto major = node.info.major;
            const auto minor = node.info.minor;
            if (major < 256 && minor < 256) {
                raw.i_block[0] = major << 8 | minor;
            } else {
                raw.i_block[1] = (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xfff00) << 12;
            }
        } else if (ext2fs_has_feature_extents(fs_->super) && node.info.type == FileType::regular) {
            raw.i_flags |= EXT4_EXTENTS_FL;
        }
        TRY_VOID(verify(ext2fs_write_new_inode(fs_, made, &raw), name));
        if ((raw.i_flags & EXT4_EXTENTS_FL) != 0) {
            ext2_extent_handle_t handle = nullptr;
            TRY_VOID(verify(ext2fs_extent_open2(fs_, made, &raw, &handle), name));
            ext2fs_extent_free(handle);
            TRY_VOID(verify(ext2fs_write_inode(fs_, made, &raw), name));
        }
        ext2fs_inode_alloc_stats2(fs_, made, 1, 0);
        return {};
    }

    Result<void> set_info(Inode inode, const FileInfo& info, std::uint32_t mode) {
        loaded_ = 0;
        auto large = TRY(load(inode));
        auto& raw = *reinterpret_cast<ext2_inode*>(&large);
        raw.i_mode = static_cast<std::uint16_t>(mode);
        raw.i_uid = static_cast<std::uint16_t>(info.user);
        raw.i_gid = static_cast<std::uint16_t>(info.group);
        raw.osd2.linux2.l_i_uid_high = static_cast<std::uint16_t>(info.user >> 16);
        raw.osd2.linux2.l_i_gid_high = static_cast<std::uint16_t>(info.group >> 16);
        const bool has_extra = EXT2_INODE_SIZE(fs_->super) > EXT2_GOOD_OLD_INODE_SIZE && large.i_extra_isize >= 24;
        store_time(info.modified, raw.i_mtime, has_extra ? &large.i_mtime_extra : nullptr);
        store_time(info.accessed, raw.i_atime, has_extra ? &large.i_atime_extra : nullptr);
        return write_inode(inode, large);
    }

    Result<void> set_attributes(Inode inode, const NewNode& node) {
        if (node.attributes.empty()) return {};
        ExtAttributes handle;
        const auto place = inode_place(inode);
        TRY_VOID(verify(ext2fs_xattrs_open(fs_, number(inode), &handle.raw), place));
        TRY_VOID(verify(ext2fs_xattrs_read(handle.raw), place));
        for (const auto& [name, value] : node.attributes)
            TRY_VOID(verify(ext2fs_xattr_set(handle.raw, name.c_str(), value.data(), value.size()), place));
        loaded_ = 0;
        return verify(ext2fs_xattrs_write(handle.raw), place);
    }

    static constexpr std::size_t most_lost = 10'000;
    static constexpr std::uint64_t most_lost_bytes = 256 * MiB;

    bool changed_ = false;               // anything
    bool begun_ = false;                 // by the call that runs
    bool sound_ = true;                  // nothing failed halfway
    std::map<Inode, std::string> lost_;  // without a name, and not freed yet
    std::uint64_t lost_bytes_ = 0;
};

}  // namespace

Result<std::unique_ptr<FileSystem>> change_ext(std::shared_ptr<Disk> disk, const Content& content) {
    auto files = std::make_unique<ExtChanges>(std::move(disk));
    TRY_VOID(files->open(content));
    return files;
}

}  // namespace qcow
