#include "filesystem/ext.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/bits.h"
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

/// The seconds of ext are 32 bits with sign. If the inode is large enough, two more bits and nanoseconds are elsewhere.
Timestamp time_of(std::uint32_t seconds, std::optional<std::uint32_t> extra) {
    const std::int64_t low = static_cast<std::int32_t>(seconds);
    if (!extra) return {low, 0};
    return {low + (static_cast<std::int64_t>(*extra & 3) << 32), *extra >> 2};
}

struct ListedBlocks {
    FileRuns& runs;
    std::uint64_t block_bytes;
};

}  // namespace

ExtFiles::~ExtFiles() {
    forget_file();
    if (fs_ == nullptr) return;
    io_.abandon();  // what was not closed is not to be written
    ext2fs_free(fs_);
}

Result<void> ExtFiles::open(const Content& content, int flags) {
    fs_ = TRY(io_.open(flags | EXT2_FLAG_64BITS | EXT2_FLAG_SKIP_MMP));
    type_ = content.type;
    return {};
}

Result<FileSystemInfo> ExtFiles::do_info() {
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

Result<FileInfo> ExtFiles::do_stat(Inode inode) {
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

Result<std::vector<DirectoryEntry>> ExtFiles::do_list(Inode directory, bool deleted, std::vector<Error>&) {
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
            to.entries.push_back({std::string(name), raw->inode, type_of_entry(ext2fs_dirent_file_type(raw)), removed});
        } catch (const std::bad_alloc&) {
            to.failed = true;
            return DIRENT_ABORT;
        }
        return 0;
    };
    TRY_VOID(verify(
        ext2fs_dir_iterate2(fs_, number(directory), deleted ? DIRENT_FLAG_INCLUDE_REMOVED : 0, nullptr, take, &listing),
        inode_place(directory)));
    if (listing.failed) return fail(Errc::no_memory, "", "out of memory");
    if (listing.too_many) {
        return fail(Errc::limit_exceeded, inode_place(directory),
                    fmt::format("the directory has more than {} entries", most_entries));
    }
    return std::move(listing.entries);
}

Result<DirectoryEntry> ExtFiles::do_lookup(Inode directory, const std::string& name) {
    TRY_VOID(expect(directory, FileType::directory));
    const auto inode = TRY(find(directory, name));
    const auto large = TRY(load(inode));
    return DirectoryEntry{name, inode, type_of_mode(reinterpret_cast<const ext2_inode&>(large).i_mode), false};
}

Result<std::size_t> ExtFiles::do_read(Inode inode, std::uint64_t at, std::span<std::byte> to) {
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

Result<std::vector<FileExtent>> ExtFiles::do_extents(Inode inode, std::uint64_t at) {
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

Result<std::string> ExtFiles::do_read_link(Inode inode) {
    TRY_VOID(expect(inode, FileType::symbolic_link));
    auto large = TRY(load(inode));
    auto& raw = *reinterpret_cast<ext2_inode*>(&large);
    const std::uint64_t size = EXT2_I_SIZE(&raw);
    if ((raw.i_flags & EXT4_ENCRYPT_FL) != 0) return fail(Errc::encrypted, inode_place(inode), "the link is encrypted");
    if (size > longest_link) return fail(Errc::corrupt, inode_place(inode), "the target of the link is too long");
    if (ext2fs_is_fast_symlink(&raw) != 0) {
        const auto* const text = reinterpret_cast<const char*>(raw.i_block);
        return std::string(text, std::min<std::size_t>(size, sizeof raw.i_block));
    }
    std::string target(size, '\0');
    target.resize(TRY(do_read(inode, 0, std::as_writable_bytes(std::span(target)))));
    return target;
}

Result<std::vector<Attribute>> ExtFiles::do_attributes(Inode inode) {
    ExtAttributes handle;
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

Result<Inode> ExtFiles::find(Inode directory, const std::string& name) {
    ext2_ino_t inode = 0;
    TRY_VOID(verify(ext2fs_lookup(fs_, number(directory), name.data(), static_cast<int>(name.size()), nullptr, &inode),
                    name));
    return inode;
}

Result<ext2_inode_large> ExtFiles::load(Inode inode) {
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

Result<void> ExtFiles::expect(Inode inode, FileType type) {
    const auto large = TRY(load(inode));
    const auto& raw = *reinterpret_cast<const ext2_inode*>(&large);
    if (type_of_mode(raw.i_mode) == type) return {};
    const auto* const what = type == FileType::directory ? "no directory"
                             : type == FileType::regular ? "no regular file"
                                                         : "no symbolic link";
    return fail(Errc::invalid_argument, inode_place(inode), fmt::format("this is {}", what));
}

Result<void> ExtFiles::readable(Inode inode) {
    const auto large = TRY(load(inode));
    const auto& raw = *reinterpret_cast<const ext2_inode*>(&large);
    if ((raw.i_flags & EXT4_ENCRYPT_FL) != 0 && LINUX_S_ISREG(raw.i_mode))
        return fail(Errc::encrypted, inode_place(inode), "the contents are encrypted (fscrypt)");
    return {};
}

Result<ext2_file_t> ExtFiles::opened_file(Inode inode) {
    if (file_ != nullptr && file_inode_ == inode) return file_;
    forget_file();
    const int flags = (fs_->flags & EXT2_FLAG_RW) != 0 ? EXT2_FILE_WRITE : 0;
    TRY_VOID(verify(ext2fs_file_open(fs_, number(inode), flags, &file_), inode_place(inode)));
    file_inode_ = inode;
    return file_;
}

void ExtFiles::forget_file() {
    if (file_ != nullptr) ext2fs_file_close(file_);
    file_ = nullptr;
}
Result<void> ExtFiles::collect_extents(Inode inode, ext2_inode& raw, FileRuns& runs) {
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

Result<void> ExtFiles::collect_blocks(Inode inode, ext2_inode& raw, FileRuns& runs) {
    if (ext2fs_inode_has_valid_blocks2(fs_, &raw) == 0) return {};
    ListedBlocks blocks{runs, fs_->blocksize};
    const auto take = [](ext2_filsys, blk64_t* block, e2_blkcnt_t count, blk64_t, int, void* data) -> int {
        auto& to = *static_cast<ListedBlocks*>(data);
        if (count < 0) return 0;
        to.runs.add(static_cast<std::uint64_t>(count) * to.block_bytes, to.block_bytes,
                    GuestOffset{*block * to.block_bytes});
        return to.runs.full() ? BLOCK_ABORT : 0;
    };
    const auto code =
        ext2fs_block_iterate3(fs_, number(inode), BLOCK_FLAG_READ_ONLY | BLOCK_FLAG_DATA_ONLY, nullptr, take, &blocks);
    return verify(code, inode_place(inode));
}
Result<std::unique_ptr<FileSystem>> open_ext(std::shared_ptr<Disk> disk, const Content& content, Access access) {
    if (access == Access::write) return change_ext(std::move(disk), content);
    auto files = std::make_unique<ExtFiles>(std::move(disk));
    TRY_VOID(files->open(content, access == Access::read_damaged ? EXT2_FLAG_IGNORE_CSUM_ERRORS : 0));
    return files;
}

}  // namespace qcow
