// ext2, ext3 and ext4, by libext2fs.

#include <ext2fs/ext2fs.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/bits.h"
#include "base/try.h"
#include "filesystem/ext_io.h"
#include "filesystem/file_runs.h"
#include "filesystem/names.h"
#include "filesystem/readers.h"

namespace qcow {
namespace {

std::string text_of(const std::uint8_t* bytes, std::size_t most) {
    const auto* const text = reinterpret_cast<const char*>(bytes);
    return {text, strnlen(text, most)};
}

FileType type_of_entry(int type) {
    switch (type) {
        case EXT2_FT_REG_FILE: return FileType::regular;
        case EXT2_FT_DIR: return FileType::directory;
        case EXT2_FT_SYMLINK: return FileType::symbolic_link;
        case EXT2_FT_CHRDEV: return FileType::character_device;
        case EXT2_FT_BLKDEV: return FileType::block_device;
        case EXT2_FT_FIFO: return FileType::fifo;
        case EXT2_FT_SOCK: return FileType::socket;
        default: return FileType::unknown;
    }
}

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

/// The seconds of ext are 32 bits with sign. If the inode is large enough, two more bits and nanoseconds are elsewhere.
Timestamp time_of(std::uint32_t seconds, std::optional<std::uint32_t> extra) {
    const std::int64_t low = static_cast<std::int32_t>(seconds);
    if (!extra) return {low, 0};
    return {low + (static_cast<std::int64_t>(*extra & 3) << 32), *extra >> 2};
}

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

class ExtFileSystem final : public FileSystem {
public:
    ExtFileSystem(std::shared_ptr<Disk> disk, Access access) : disk_(std::move(disk)), io_(*disk_), access_(access) {}
    ~ExtFileSystem() override {
        forget_file();
        if (fs_ == nullptr) return;
        io_.abandon();  // what was not closed is not to be written
        ext2fs_free(fs_);
    }

    Result<void> open(const Content& content) {
        const bool writing = access_ == Access::write;
        int flags = EXT2_FLAG_64BITS;
        flags |= EXT2_FLAG_SKIP_MMP | (writing ? EXT2_FLAG_RW : 0);
        fs_ = TRY(io_.open(flags));
        type_ = content.type;
        if (!writing) return {};
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
        return verify(ext2fs_read_bitmaps(fs_), "bitmaps");
    }

    [[nodiscard]] Inode root() const override { return EXT2_ROOT_INO; }

protected:
    Result<FileSystemInfo> do_info() override {
        auto& super = *fs_->super;
        FileSystemInfo info;
        info.type = type_;
        info.label = text_of(super.s_volume_name, sizeof super.s_volume_name);
        info.uuid = uuid_text(std::as_bytes(std::span(super.s_uuid)));
        info.block_bytes = fs_->blocksize;
        info.bytes = bytes_of(ext2fs_blocks_count(&super));
        info.free_bytes = bytes_of(ext2fs_free_blocks_count(&super));
        info.inodes = super.s_inodes_count;
        info.free_inodes = super.s_free_inodes_count;
        if (ext2fs_has_feature_journal_needs_recovery(&super))
            info.warnings.emplace_back("the journal was not replayed: what was written last may be missing");
        if ((super.s_state & EXT2_ERROR_FS) != 0) info.warnings.emplace_back("the file system is marked as damaged");
        return info;
    }

    Result<FileInfo> do_stat(Inode inode) override {
        const auto& large = TRY(load(inode));
        const auto& raw = *reinterpret_cast<const ext2_inode*>(&large);
        FileInfo info;
        info.inode = inode;
        info.type = type_of_mode(raw.i_mode);
        info.mode = raw.i_mode & 07777U;
        info.user = inode_uid(raw);
        info.group = inode_gid(raw);
        info.links = raw.i_links_count;
        info.size = EXT2_I_SIZE(&raw);
        info.stored_bytes = ext2fs_inode_i_blocks(fs_, const_cast<ext2_inode*>(&raw)) *
                            ((raw.i_flags & EXT4_HUGE_FILE_FL) != 0 ? fs_->blocksize : 512);
        if (info.type == FileType::character_device || info.type == FileType::block_device) {
            if (raw.i_block[0] != 0) {  // eight bits each
                info.major = raw.i_block[0] >> 8 & 0xff;
                info.minor = raw.i_block[0] & 0xff;
            } else {  // twelve bits, and twenty in two parts
                info.major = raw.i_block[1] >> 8 & 0xfff;
                info.minor = (raw.i_block[1] & 0xff) | (raw.i_block[1] >> 12 & 0xfff00);
            }
        }
        const auto extra = [&](std::size_t end, std::uint32_t value) -> std::optional<std::uint32_t> {
            if (EXT2_INODE_SIZE(fs_->super) <= EXT2_GOOD_OLD_INODE_SIZE) return {};
            if (end > EXT2_GOOD_OLD_INODE_SIZE + std::size_t{large.i_extra_isize}) return {};
            return value;
        };
#define QCOW_END_OF(field) (offsetof(ext2_inode_large, field) + sizeof(large.field))
        info.modified = time_of(raw.i_mtime, extra(QCOW_END_OF(i_mtime_extra), large.i_mtime_extra));
        info.accessed = time_of(raw.i_atime, extra(QCOW_END_OF(i_atime_extra), large.i_atime_extra));
        info.changed = time_of(raw.i_ctime, extra(QCOW_END_OF(i_ctime_extra), large.i_ctime_extra));
        if (const auto created = extra(QCOW_END_OF(i_crtime), large.i_crtime))
            info.created = time_of(*created, extra(QCOW_END_OF(i_crtime_extra), large.i_crtime_extra));
#undef QCOW_END_OF
        info.deleted = raw.i_dtime != 0 && raw.i_links_count == 0;
        info.encrypted = (raw.i_flags & EXT4_ENCRYPT_FL) != 0;
        return info;
    }

    Result<std::vector<DirectoryEntry>> do_list(Inode directory, bool deleted, std::vector<Error>&) override {
        TRY_VOID(expect(directory, FileType::directory));
        struct Listing {
            std::vector<DirectoryEntry> entries;
            bool too_many = false;
            bool failed = false;
        } listing;
        const auto take = [](ext2_ino_t, int kind, ext2_dir_entry* raw, int, int, char*, void* data) -> int {
            auto& to = *static_cast<Listing*>(data);
            const auto length = static_cast<std::size_t>(ext2fs_dirent_name_len(raw));
            const std::string_view name(raw->name, length);
            if (raw->inode == 0 || name == "." || name == ".." || length == 0) return 0;
            if (to.entries.size() >= most_entries) {
                to.too_many = true;
                return DIRENT_ABORT;
            }
            const bool removed = kind == DIRENT_DELETED_FILE;
            // What a removed entry leaves may be overwritten in part.
            if (removed && !is_entry_name(name)) return 0;
            try {
                to.entries.push_back(
                    {std::string(name), raw->inode, type_of_entry(ext2fs_dirent_file_type(raw)), removed});
            } catch (const std::bad_alloc&) {
                to.failed = true;
                return DIRENT_ABORT;
            }
            return 0;
        };
        TRY_VOID(verify(ext2fs_dir_iterate2(fs_, number(directory), deleted ? DIRENT_FLAG_INCLUDE_REMOVED : 0, nullptr,
                                            take, &listing),
                        inode_place(directory)));
        if (listing.failed) return fail(Errc::no_memory, "", "out of memory");
        if (listing.too_many) {
            return fail(Errc::limit_exceeded, inode_place(directory),
                        fmt::format("the directory has more than {} entries", most_entries));
        }
        return std::move(listing.entries);
    }

    Result<DirectoryEntry> do_lookup(Inode directory, const std::string& name) override {
        TRY_VOID(expect(directory, FileType::directory));
        const auto inode = TRY(find(directory, name));
        const auto large = TRY(load(inode));
        return DirectoryEntry{name, inode, type_of_mode(reinterpret_cast<const ext2_inode&>(large).i_mode), false};
    }

    Result<std::size_t> do_read(Inode inode, std::uint64_t at, std::span<std::byte> to) override {
        TRY_VOID(readable(inode));
        auto* const file = TRY(opened_file(inode));
        TRY_VOID(verify(ext2fs_file_llseek(file, at, EXT2_SEEK_SET, nullptr), inode_place(inode)));
        std::size_t done = 0;
        while (done < to.size()) {
            unsigned got = 0;
            const auto part = static_cast<unsigned>(std::min<std::size_t>(to.size() - done, 1 * MiB));
            TRY_VOID(verify(ext2fs_file_read(file, to.data() + done, part, &got), inode_place(inode)));
            if (got == 0) break;
            done += got;
        }
        // What lies in an inode ends before the file, if zeros follow.
        const auto large = TRY(load(inode));
        const auto& raw = *reinterpret_cast<const ext2_inode*>(&large);
        const std::uint64_t size = EXT2_I_SIZE(&raw);
        if ((raw.i_flags & EXT4_INLINE_DATA_FL) != 0 && at + done < size) {
            const auto zeros = to.first(std::min<std::uint64_t>(to.size(), size - at)).subspan(done);
            std::ranges::fill(zeros, std::byte{0});
            done += zeros.size();
        }
        return done;
    }

    Result<std::vector<FileExtent>> do_extents(Inode inode, std::uint64_t at) override {
        TRY_VOID(readable(inode));
        auto large = TRY(load(inode));
        auto& raw = *reinterpret_cast<ext2_inode*>(&large);
        if ((raw.i_flags & EXT4_INLINE_DATA_FL) != 0)
            return fail(Errc::unsupported, inode_place(inode), "the contents lie in the inode");
        const std::uint64_t size = EXT2_I_SIZE(&raw);
        FileRuns runs(at, size);
        if ((raw.i_flags & EXT4_EXTENTS_FL) != 0) {
            TRY_VOID(collect_extents(inode, raw, runs));
        } else {
            TRY_VOID(collect_blocks(inode, raw, runs));
        }
        return std::move(runs).finished();
    }

    Result<std::string> do_read_link(Inode inode) override {
        TRY_VOID(expect(inode, FileType::symbolic_link));
        auto large = TRY(load(inode));
        auto& raw = *reinterpret_cast<ext2_inode*>(&large);
        const std::uint64_t size = EXT2_I_SIZE(&raw);
        if ((raw.i_flags & EXT4_ENCRYPT_FL) != 0)
            return fail(Errc::encrypted, inode_place(inode), "the link is encrypted");
        if (size > longest_link) return fail(Errc::corrupt, inode_place(inode), "the target of the link is too long");
        if (ext2fs_is_fast_symlink(&raw) != 0) {
            const auto* const text = reinterpret_cast<const char*>(raw.i_block);
            return std::string(text, std::min<std::size_t>(size, sizeof raw.i_block));
        }
        std::string target(size, '\0');
        target.resize(TRY(do_read(inode, 0, std::as_writable_bytes(std::span(target)))));
        return target;
    }

    Result<std::vector<Attribute>> do_attributes(Inode inode) override {
        XattrHandle handle;
        const auto code = ext2fs_xattrs_open(fs_, number(inode), &handle.raw);
        if (code == EXT2_ET_MISSING_EA_FEATURE) return std::vector<Attribute>();  // a file system without attributes
        TRY_VOID(verify(code, inode_place(inode)));
        TRY_VOID(verify(ext2fs_xattrs_read(handle.raw), inode_place(inode)));
        std::vector<std::string> names;
        const auto take = [](char* name, char*, std::size_t, void* data) -> int {
            try {
                static_cast<std::vector<std::string>*>(data)->emplace_back(name);
                return 0;
            } catch (const std::bad_alloc&) {
                return XATTR_ABORT;
            }
        };
        TRY_VOID(verify(ext2fs_xattrs_iterate(handle.raw, take, &names), inode_place(inode)));
        std::vector<Attribute> attributes;
        for (const auto& name : names) {
            if (name == "system.data") continue;  // inline contents
            void* value = nullptr;
            std::size_t length = 0;
            TRY_VOID(verify(ext2fs_xattr_get(handle.raw, name.c_str(), &value, &length), inode_place(inode)));
            const auto* const bytes = static_cast<const std::byte*>(value);
            attributes.push_back({name, {bytes, bytes + std::min(length, longest_attribute)}});
            ext2fs_free_mem(static_cast<void*>(&value));
        }
        return attributes;
    }

    // ---- Changes ----

    Result<Inode> do_create(Inode directory, const std::string& name, const NewNode& node) override {
        TRY_VOID(expect(directory, FileType::directory));
        const auto above = TRY(load(directory));
        if ((reinterpret_cast<const ext2_inode&>(above).i_flags & EXT4_ENCRYPT_FL) != 0)
            return fail(Errc::encrypted, name, "the directory is encrypted (fscrypt), and takes no new files");
        if (name.size() > EXT2_NAME_LEN)
            return fail(Errc::invalid_argument, name, fmt::format("names in ext have at most {} bytes", EXT2_NAME_LEN));
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
        TRY_VOID(do_remove(directory, name));
        return std::unexpected(std::move(done).error());
    }

    Result<void> do_write(Inode inode, std::uint64_t at, std::span<const std::byte> from) override {
        TRY_VOID(expect(inode, FileType::regular));
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

    Result<void> do_truncate(Inode inode, std::uint64_t size) override {
        TRY_VOID(expect(inode, FileType::regular));
        TRY_VOID(begin_change());
        auto* const file = TRY(opened_file(inode));
        loaded_ = 0;
        return verify(ext2fs_file_set_size2(file, static_cast<ext2_off64_t>(size)), inode_place(inode));
    }

    Result<void> do_remove(Inode directory, const std::string& name) override {
        forget_file();
        loaded_ = 0;
        TRY_VOID(expect(directory, FileType::directory));
        const auto inode = number(TRY(find(directory, name)));
        const auto large = TRY(load(inode));
        const bool is_directory = LINUX_S_ISDIR(reinterpret_cast<const ext2_inode&>(large).i_mode);
        std::vector<Error> refused;
        if (is_directory && (!TRY(do_list(inode, false, refused)).empty() || !refused.empty())) {
            return fail(Errc::invalid_argument, name,
                        "the directory is not empty; --recursive removes what is in it, too");
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

    Result<void> do_replace(Inode directory, const std::string& from, const std::string& to) override {
        forget_file();
        loaded_ = 0;
        TRY_VOID(expect(directory, FileType::directory));
        const auto made = TRY(do_lookup(directory, from));
        const auto old = TRY(do_lookup(directory, to));
        if (made.type == FileType::directory || old.type == FileType::directory)
            return fail(Errc::invalid_argument, to, "a directory is not replaced, and replaces nothing");
        TRY_VOID(begin_change());
        // The entry stays where it is, so there is always room for it.
        struct Change {
            const std::string& name;
            ext2_ino_t inode;
            int type;
            bool done = false;
        } change{to, number(made.inode), 0};
        if (ext2fs_has_feature_filetype(fs_->super)) change.type = entry_of_type(made.type);
        const auto change_entry = [](ext2_ino_t, int kind, ext2_dir_entry* raw, int, int, char*, void* data) -> int {
            auto& with = *static_cast<Change*>(data);
            const auto length = static_cast<std::size_t>(ext2fs_dirent_name_len(raw));
            if (kind != DIRENT_OTHER_FILE || std::string_view(raw->name, length) != with.name) return 0;
            raw->inode = with.inode;
            ext2fs_dirent_set_file_type(raw, with.type);
            with.done = true;
            return DIRENT_CHANGED | DIRENT_ABORT;
        };
        TRY_VOID(verify(ext2fs_dir_iterate2(fs_, number(directory), 0, nullptr, change_entry, &change), to));
        if (!change.done) return fail(Errc::corrupt, to, "its entry cannot be found in the directory");
        loaded_ = 0;
        TRY_VOID(verify(ext2fs_unlink(fs_, number(directory), from.c_str(), number(made.inode), 0), from));
        return lose_name(old.inode, to);
    }

    Result<void> do_close() override {
        forget_file();
        if (fs_ == nullptr) return {};
        ext2_filsys closed = std::exchange(fs_, nullptr);
        // libext2fs writes the superblock after everything else is durable.
        if (changed_ && !io_.failed()) set_clean(*closed, true);
        return io_.verify(ext2fs_close_free(&closed), type_);
    }

private:
    static void set_clean(struct_ext2_filsys& fs, bool clean) {
        if (clean) {
            fs.super->s_state |= EXT2_VALID_FS;
        } else {
            fs.super->s_state &= static_cast<std::uint16_t>(~EXT2_VALID_FS);
        }
        ext2fs_mark_super_dirty(&fs);
    }

    /// Marks the file system as not clean, durably, before its first change. libext2fs writes in an order of its own,
    /// so a process that dies meanwhile leaves work for e2fsck, as one does that has it mounted.
    Result<void> begin_change() {
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

    /// The inode with this name. Errors: Errc::not_found.
    Result<Inode> find(Inode directory, const std::string& name) {
        ext2_ino_t inode = 0;
        TRY_VOID(verify(
            ext2fs_lookup(fs_, number(directory), name.data(), static_cast<int>(name.size()), nullptr, &inode), name));
        return inode;
    }

    /// Counts a name less, and frees the inode and its blocks after the last one. `name` is for messages.
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

        raw.i_dtime = static_cast<std::uint32_t>(fs_->now != 0 ? fs_->now : time(nullptr));
        TRY_VOID(write_inode(inode, large));
        const auto freed = ext2fs_free_ext_attr(fs_, inode, &large);
        if (freed != EXT2_ET_EA_NO_SPACE) TRY_VOID(verify(freed, name));
        TRY_VOID(write_inode(inode, large));
        if (ext2fs_inode_has_valid_blocks2(fs_, &raw) != 0) {
            // Not ext2fs_punch: it refuses to free the last block of a file system.
            const auto release = [](ext2_filsys fs, blk64_t* block, e2_blkcnt_t, blk64_t, int, void*) -> int {
                if (*block % static_cast<blk64_t>(EXT2FS_CLUSTER_RATIO(fs)) == 0)
                    ext2fs_block_alloc_stats2(fs, *block, -1);
                return 0;
            };
            TRY_VOID(verify(ext2fs_block_iterate3(fs_, inode, BLOCK_FLAG_READ_ONLY, nullptr, release, nullptr), name));
        }
        ext2fs_inode_alloc_stats2(fs_, inode, -1, is_directory ? 1 : 0);
        return {};
    }

    struct XattrHandle {
        ext2_xattr_handle* raw = nullptr;
        XattrHandle() = default;
        XattrHandle(const XattrHandle&) = delete;
        XattrHandle& operator=(const XattrHandle&) = delete;
        ~XattrHandle() {
            if (raw != nullptr) ext2fs_xattrs_close(&raw);
        }
    };

    Result<void> collect_extents(Inode inode, ext2_inode& raw, FileRuns& runs) {
        ext2_extent_handle_t handle = nullptr;
        TRY_VOID(verify(ext2fs_extent_open2(fs_, number(inode), &raw, &handle), inode_place(inode)));
        const std::unique_ptr<ext2_extent_handle, void (*)(ext2_extent_handle_t)> owner(handle, ext2fs_extent_free);
        ext2fs_extent extent = {};
        int move = EXT2_EXTENT_ROOT;
        while (!runs.full()) {
            const auto code = ext2fs_extent_get(handle, move, &extent);
            move = EXT2_EXTENT_NEXT;
            if (code == EXT2_ET_EXTENT_NO_NEXT || code == EXT2_ET_NO_CURRENT_NODE) return {};
            TRY_VOID(verify(code, inode_place(inode)));
            if ((extent.e_flags & EXT2_EXTENT_FLAGS_LEAF) == 0) continue;
            std::optional<GuestOffset> stored;
            if ((extent.e_flags & EXT2_EXTENT_FLAGS_UNINIT) == 0) stored = GuestOffset{bytes_of(extent.e_pblk)};
            if (extent.e_len == 0 || !runs.add(bytes_of(extent.e_lblk), bytes_of(extent.e_len), stored))
                return fail(Errc::corrupt, inode_place(inode), "its extents are not in order");
        }
        return {};
    }

    struct Blocks {
        FileRuns& runs;
        std::uint64_t block_bytes;
    };
    Result<void> collect_blocks(Inode inode, ext2_inode& raw, FileRuns& runs) {
        if (ext2fs_inode_has_valid_blocks2(fs_, &raw) == 0) return {};
        Blocks blocks{runs, fs_->blocksize};
        const auto take = [](ext2_filsys, blk64_t* block, e2_blkcnt_t count, blk64_t, int, void* data) -> int {
            auto& to = *static_cast<Blocks*>(data);
            if (count < 0) return 0;
            to.runs.add(static_cast<std::uint64_t>(count) * to.block_bytes, to.block_bytes,
                        GuestOffset{*block * to.block_bytes});
            return to.runs.full() ? BLOCK_ABORT : 0;
        };
        const auto code = ext2fs_block_iterate3(fs_, number(inode), BLOCK_FLAG_READ_ONLY | BLOCK_FLAG_DATA_ONLY,
                                                nullptr, take, &blocks);
        return verify(code, inode_place(inode));
    }

    [[nodiscard]] std::uint64_t bytes_of(std::uint64_t blocks) const { return blocks * fs_->blocksize; }
    static ext2_ino_t number(Inode inode) { return static_cast<ext2_ino_t>(inode); }

    Result<void> verify(errcode_t code, const std::string& place) { return io_.verify(code, place); }

    /// The inode, from memory if it was asked for just now.
    Result<ext2_inode_large> load(Inode inode) {
        if (inode == 0 || inode > fs_->super->s_inodes_count)
            return fail(Errc::not_found, inode_place(inode), "the file system has no such inode");
        if (loaded_ == inode) return inode_;
        inode_ = {};
        TRY_VOID(verify(ext2fs_read_inode_full(fs_, number(inode), reinterpret_cast<ext2_inode*>(&inode_),
                                               static_cast<int>(sizeof inode_)),
                        inode_place(inode)));
        loaded_ = inode;
        return inode_;
    }

    Result<void> write_inode(Inode inode, ext2_inode_large& large) {
        loaded_ = 0;
        return verify(
            ext2fs_write_inode_full(fs_, number(inode), reinterpret_cast<ext2_inode*>(&large),
                                    static_cast<int>(std::min<std::size_t>(sizeof large, EXT2_INODE_SIZE(fs_->super)))),
            inode_place(inode));
    }

    Result<void> expect(Inode inode, FileType type) {
        const auto large = TRY(load(inode));
        const auto& raw = *reinterpret_cast<const ext2_inode*>(&large);
        if (type_of_mode(raw.i_mode) == type) return {};
        const auto* const what = type == FileType::directory ? "no directory"
                                 : type == FileType::regular ? "no regular file"
                                                             : "no symbolic link";
        return fail(Errc::invalid_argument, inode_place(inode), fmt::format("this is {}", what));
    }

    Result<void> readable(Inode inode) {
        const auto large = TRY(load(inode));
        const auto& raw = *reinterpret_cast<const ext2_inode*>(&large);
        if ((raw.i_flags & EXT4_ENCRYPT_FL) != 0 && LINUX_S_ISREG(raw.i_mode))
            return fail(Errc::encrypted, inode_place(inode), "the contents are encrypted (fscrypt)");
        return {};
    }

    Result<ext2_file_t> opened_file(Inode inode) {
        if (file_ != nullptr && file_inode_ == inode) return file_;
        forget_file();
        const int flags = access_ == Access::write ? EXT2_FILE_WRITE : 0;
        TRY_VOID(verify(ext2fs_file_open(fs_, number(inode), flags, &file_), inode_place(inode)));
        file_inode_ = inode;
        return file_;
    }

    void forget_file() {
        if (file_ != nullptr) ext2fs_file_close(file_);
        file_ = nullptr;
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
        XattrHandle handle;
        const auto place = inode_place(inode);
        TRY_VOID(verify(ext2fs_xattrs_open(fs_, number(inode), &handle.raw), place));
        TRY_VOID(verify(ext2fs_xattrs_read(handle.raw), place));
        for (const auto& [name, value] : node.attributes)
            TRY_VOID(verify(ext2fs_xattr_set(handle.raw, name.c_str(), value.data(), value.size()), place));
        loaded_ = 0;
        return verify(ext2fs_xattrs_write(handle.raw), place);
    }

    std::shared_ptr<Disk> disk_;
    ExtIo io_;
    Access access_;
    ext2_filsys fs_ = nullptr;
    std::string type_;
    bool changed_ = false;
    ext2_file_t file_ = nullptr;
    Inode file_inode_ = 0;
    ext2_inode_large inode_ = {};
    Inode loaded_ = 0;
};

}  // namespace

Result<std::unique_ptr<FileSystem>> open_ext(std::shared_ptr<Disk> disk, const Content& content, Access access) {
    auto files = std::make_unique<ExtFileSystem>(std::move(disk), access);
    TRY_VOID(files->open(content));
    return files;
}

}  // namespace qcow
