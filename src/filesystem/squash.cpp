// squashfs, by libsquashfs.

#include <fmt/format.h>
#include <sqfs/compressor.h>
#include <sqfs/data_reader.h>
#include <sqfs/dir.h>
#include <sqfs/error.h>
#include <sqfs/id_table.h>
#include <sqfs/inode.h>
#include <sqfs/io.h>
#include <sqfs/meta_reader.h>
#include <sqfs/super.h>
#include <sqfs/xattr.h>
#include <sqfs/xattr_reader.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>

#include "base/bits.h"
#include "base/try.h"
#include "filesystem/readers.h"

namespace qcow {
namespace {

struct Destroy {
    void operator()(void* object) const { sqfs_destroy(object); }
};
template <class T>
using Owned = std::unique_ptr<T, Destroy>;

struct Free {
    void operator()(void* memory) const { sqfs_free(memory); }
};
template <class T>
using Freed = std::unique_ptr<T, Free>;

/// The file that libsquashfs reads: its structure, with what is ours behind it.
struct DiskFile {
    sqfs_file_t base = {};
    Disk* disk = nullptr;
    std::optional<Error> error = {};  // the first one of the disk
};
static_assert(std::is_standard_layout_v<sqfs_file_t>);

int read_disk(sqfs_file_t* base, sqfs_u64 at, void* to, std::size_t length) {
    auto& file = *reinterpret_cast<DiskFile*>(base);  // its first member
    if (!lies_within(at, length, file.disk->size())) return SQFS_ERROR_OUT_OF_BOUNDS;
    auto done = file.disk->read({at}, std::span(static_cast<std::byte*>(to), length));
    if (done) return 0;
    if (!file.error) file.error = std::move(done).error();
    return SQFS_ERROR_IO;
}
int refuse_write(sqfs_file_t*, sqfs_u64, const void*, std::size_t) { return SQFS_ERROR_UNSUPPORTED; }
int refuse_truncate(sqfs_file_t*, sqfs_u64) { return SQFS_ERROR_UNSUPPORTED; }
sqfs_u64 disk_size(const sqfs_file_t* base) { return reinterpret_cast<const DiskFile*>(base)->disk->size(); }
void keep_file(sqfs_object_t*) {}

/// An inode is named by its reference: the place of its metadata block, and the offset in there.
class SquashFileSystem final : public FileSystem {
public:
    explicit SquashFileSystem(std::shared_ptr<Disk> disk) : disk_(std::move(disk)) {
        file_.base.base.destroy = keep_file;
        file_.base.read_at = read_disk;
        file_.base.write_at = refuse_write;
        file_.base.get_size = disk_size;
        file_.base.truncate = refuse_truncate;
        file_.disk = disk_.get();
    }

    Result<void> open(const Content& content) {
        content_ = content;
        TRY_VOID(verify(sqfs_super_read(&super_, &file_.base), "superblock"));
        sqfs_compressor_config_t config = {};
        TRY_VOID(verify(sqfs_compressor_config_init(&config, static_cast<SQFS_COMPRESSOR>(super_.compression_id),
                                                    super_.block_size, SQFS_COMP_FLAG_UNCOMPRESS),
                        "compression"));
        sqfs_compressor_t* compressor = nullptr;
        TRY_VOID(verify(sqfs_compressor_create(&config, &compressor), "compression"));
        compressor_.reset(compressor);
        ids_.reset(sqfs_id_table_create(0));
        data_.reset(sqfs_data_reader_create(&file_.base, super_.block_size, compressor, 0));
        xattrs_.reset(sqfs_xattr_reader_create(0));
        inodes_.reset(
            sqfs_meta_reader_create(&file_.base, compressor, super_.inode_table_start, super_.directory_table_start));
        const std::uint64_t end_of_directories =
            std::min({super_.id_table_start, super_.fragment_table_start, super_.export_table_start});
        directories_.reset(
            sqfs_meta_reader_create(&file_.base, compressor, super_.directory_table_start, end_of_directories));
        if (!ids_ || !data_ || !xattrs_ || !inodes_ || !directories_) return fail(Errc::no_memory, "", "out of memory");
        TRY_VOID(verify(sqfs_id_table_read(ids_.get(), &file_.base, &super_, compressor), "table of owners"));
        TRY_VOID(verify(sqfs_data_reader_load_fragment_table(data_.get(), &super_), "table of fragments"));
        has_xattrs_ = (super_.flags & SQFS_FLAG_NO_XATTRS) == 0 && super_.xattr_id_table_start != ~std::uint64_t{0};
        if (has_xattrs_) {
            TRY_VOID(
                verify(sqfs_xattr_reader_load(xattrs_.get(), &super_, &file_.base, compressor), "table of attributes"));
        }
        return {};
    }

    [[nodiscard]] Inode root() const override { return super_.root_inode_ref; }

protected:
    Result<FileSystemInfo> do_info() override {
        FileSystemInfo info;
        info.type = content_.type;
        info.block_bytes = super_.block_size;
        info.bytes = super_.bytes_used;
        info.free_bytes = 0;
        info.inodes = super_.inode_count;
        info.free_inodes = 0;
        return info;
    }

    Result<FileInfo> do_stat(Inode inode) override {
        const auto& node = *TRY(load(inode));
        FileInfo info;
        info.inode = inode;
        info.mode = node.base.mode & 07777U;
        sqfs_u32 user = 0;
        sqfs_u32 group = 0;
        TRY_VOID(verify(sqfs_id_table_index_to_id(ids_.get(), node.base.uid_idx, &user), "owner"));
        TRY_VOID(verify(sqfs_id_table_index_to_id(ids_.get(), node.base.gid_idx, &group), "group"));
        info.user = user;
        info.group = group;
        info.modified = Timestamp{node.base.mod_time, 0};
        const auto device = [&](std::uint32_t links, std::uint32_t number) {
            info.links = links;
            info.major = number >> 8 & 0xfff;
            info.minor = (number & 0xff) | (number >> 12 & 0xfff00);
        };
        switch (node.base.type) {
            case SQFS_INODE_DIR:
                info.type = FileType::directory;
                info.links = node.data.dir.nlink;
                break;
            case SQFS_INODE_EXT_DIR:
                info.type = FileType::directory;
                info.links = node.data.dir_ext.nlink;
                break;
            case SQFS_INODE_FILE: info.type = FileType::regular; break;
            case SQFS_INODE_EXT_FILE:
                info.type = FileType::regular;
                info.links = node.data.file_ext.nlink;
                break;
            case SQFS_INODE_SLINK:
                info.type = FileType::symbolic_link;
                info.links = node.data.slink.nlink;
                break;
            case SQFS_INODE_EXT_SLINK:
                info.type = FileType::symbolic_link;
                info.links = node.data.slink_ext.nlink;
                break;
            case SQFS_INODE_BDEV:
                info.type = FileType::block_device;
                device(node.data.dev.nlink, node.data.dev.devno);
                break;
            case SQFS_INODE_CDEV:
                info.type = FileType::character_device;
                device(node.data.dev.nlink, node.data.dev.devno);
                break;
            case SQFS_INODE_EXT_BDEV:
                info.type = FileType::block_device;
                device(node.data.dev_ext.nlink, node.data.dev_ext.devno);
                break;
            case SQFS_INODE_EXT_CDEV:
                info.type = FileType::character_device;
                device(node.data.dev_ext.nlink, node.data.dev_ext.devno);
                break;
            case SQFS_INODE_FIFO:
            case SQFS_INODE_EXT_FIFO:
                info.type = FileType::fifo;
                info.links = node.data.ipc.nlink;
                break;
            case SQFS_INODE_SOCKET:
            case SQFS_INODE_EXT_SOCKET:
                info.type = FileType::socket;
                info.links = node.data.ipc.nlink;
                break;
            default: break;
        }
        if (info.type == FileType::regular) {
            sqfs_u64 size = 0;
            TRY_VOID(verify(sqfs_inode_get_file_size(&node, &size), place(inode)));
            info.size = size;
        }
        if (info.type == FileType::symbolic_link) info.size = TRY(do_read_link(inode)).size();
        return info;
    }

    Result<std::vector<DirectoryEntry>> do_list(Inode directory, bool, std::vector<Error>&) override {
        const auto& node = *TRY(load(directory));
        if (node.base.type != SQFS_INODE_DIR && node.base.type != SQFS_INODE_EXT_DIR)
            return fail(Errc::invalid_argument, place(directory), "this is no directory");
        sqfs_readdir_state_t state = {};
        TRY_VOID(verify(sqfs_readdir_state_init(&state, &super_, &node), place(directory)));
        std::vector<DirectoryEntry> entries;
        while (true) {
            sqfs_dir_entry_t* raw = nullptr;
            sqfs_u64 reference = 0;
            const int code = sqfs_meta_reader_readdir(directories_.get(), &state, &raw, nullptr, &reference);
            const Freed<sqfs_dir_entry_t> entry(raw);
            if (code > 0) return entries;
            TRY_VOID(verify(code, place(directory)));
            if (entries.size() >= most_entries) {
                return fail(Errc::limit_exceeded, place(directory),
                            fmt::format("the directory has more than {} entries", most_entries));
            }
            std::string name(reinterpret_cast<const char*>(entry->name), std::size_t{entry->size} + 1);
            entries.push_back({std::move(name), reference, type_of(entry->type), false});
        }
    }

    Result<std::size_t> do_read(Inode inode, std::uint64_t at, std::span<std::byte> to) override {
        const auto& node = *TRY(load(inode));
        if (node.base.type != SQFS_INODE_FILE && node.base.type != SQFS_INODE_EXT_FILE)
            return fail(Errc::invalid_argument, place(inode), "this is no regular file");
        std::size_t done = 0;
        while (done < to.size()) {
            const auto part = static_cast<sqfs_u32>(std::min<std::size_t>(to.size() - done, 1 * MiB));
            const auto got = sqfs_data_reader_read(data_.get(), &node, at + done, to.data() + done, part);
            if (got < 0) TRY_VOID(verify(got, place(inode)));
            if (got <= 0) break;
            done += static_cast<std::size_t>(got);
        }
        return done;
    }

    Result<std::string> do_read_link(Inode inode) override {
        const auto& node = *TRY(load(inode));
        std::uint32_t size = 0;
        if (node.base.type == SQFS_INODE_SLINK) {
            size = node.data.slink.target_size;
        } else if (node.base.type == SQFS_INODE_EXT_SLINK) {
            size = node.data.slink_ext.target_size;
        } else {
            return fail(Errc::invalid_argument, place(inode), "this is no symbolic link");
        }
        if (size > longest_link) return fail(Errc::corrupt, place(inode), "the target of the link is too long");
        return std::string(reinterpret_cast<const char*>(node.extra), size);
    }

    Result<std::vector<Attribute>> do_attributes(Inode inode) override {
        std::vector<Attribute> attributes;
        if (!has_xattrs_) return attributes;
        constexpr std::uint32_t none = 0xffffffff;
        sqfs_u32 index = none;
        TRY_VOID(verify(sqfs_inode_get_xattr_index(TRY(load(inode)), &index), place(inode)));
        if (index == none) return attributes;
        sqfs_xattr_id_t list = {};
        TRY_VOID(verify(sqfs_xattr_reader_get_desc(xattrs_.get(), index, &list), place(inode)));
        TRY_VOID(verify(sqfs_xattr_reader_seek_kv(xattrs_.get(), &list), place(inode)));
        constexpr std::uint32_t most = 4096;
        for (std::uint32_t i = 0; i < std::min(list.count, most); ++i) {
            sqfs_xattr_entry_t* raw_key = nullptr;
            TRY_VOID(verify(sqfs_xattr_reader_read_key(xattrs_.get(), &raw_key), place(inode)));
            const Freed<sqfs_xattr_entry_t> key(raw_key);
            sqfs_xattr_value_t* raw_value = nullptr;
            TRY_VOID(verify(sqfs_xattr_reader_read_value(xattrs_.get(), key.get(), &raw_value), place(inode)));
            const Freed<sqfs_xattr_value_t> value(raw_value);
            const auto* const bytes = reinterpret_cast<const std::byte*>(value->value);
            attributes.push_back({reinterpret_cast<const char*>(key->key),
                                  {bytes, bytes + std::min<std::size_t>(value->size, longest_attribute)}});
        }
        return attributes;
    }

private:
    static std::string place(Inode inode) { return fmt::format("inode {:#x}", inode); }

    static FileType type_of(unsigned type) {
        switch (type) {
            case SQFS_INODE_DIR: return FileType::directory;
            case SQFS_INODE_FILE: return FileType::regular;
            case SQFS_INODE_SLINK: return FileType::symbolic_link;
            case SQFS_INODE_BDEV: return FileType::block_device;
            case SQFS_INODE_CDEV: return FileType::character_device;
            case SQFS_INODE_FIFO: return FileType::fifo;
            case SQFS_INODE_SOCKET: return FileType::socket;
            default: return FileType::unknown;
        }
    }

    Result<void> verify(int code, const std::string& where) {
        if (code >= 0) return {};
        if (file_.error) return std::unexpected(std::exchange(file_.error, std::nullopt).value().in(where));
        if (code == SQFS_ERROR_ALLOC) return fail(Errc::no_memory, where, "out of memory");
        if (code == SQFS_ERROR_UNSUPPORTED) return fail(Errc::unsupported, where, "libsquashfs does not support it");
        return fail(Errc::corrupt, where, fmt::format("the file system is damaged (libsquashfs: error {})", -code));
    }

    Result<const sqfs_inode_generic_t*> load(Inode inode) {
        if (node_ && loaded_ == inode) return node_.get();
        node_.reset();
        sqfs_inode_generic_t* raw = nullptr;
        const auto code = sqfs_meta_reader_read_inode(inodes_.get(), &super_, inode >> 16, inode & 0xffff, &raw);
        node_.reset(raw);
        TRY_VOID(verify(code, place(inode)));
        loaded_ = inode;
        return node_.get();
    }

    std::shared_ptr<Disk> disk_;
    DiskFile file_;
    Content content_;
    sqfs_super_t super_ = {};
    // Destroyed in reverse order: the compressor last.
    Owned<sqfs_compressor_t> compressor_;
    Owned<sqfs_id_table_t> ids_;
    Owned<sqfs_data_reader_t> data_;
    Owned<sqfs_xattr_reader_t> xattrs_;
    Owned<sqfs_meta_reader_t> inodes_;
    Owned<sqfs_meta_reader_t> directories_;
    bool has_xattrs_ = false;
    Freed<sqfs_inode_generic_t> node_;
    Inode loaded_ = 0;
};

}  // namespace

Result<std::unique_ptr<FileSystem>> open_squash(std::shared_ptr<Disk> disk, const Content& content) {
    auto files = std::make_unique<SquashFileSystem>(std::move(disk));
    TRY_VOID(files->open(content));
    return files;
}

}  // namespace qcow
