#pragma once
// ext2, ext3 and ext4, by libext2fs.

#include <ext2fs/ext2fs.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/try.h"
#include "filesystem/ext_io.h"
#include "qcow/filesystem.h"

namespace qcow {

class FileRuns;

/// The extended attributes of an inode, as libext2fs holds them.
struct ExtAttributes {
    ext2_xattr_handle* raw = nullptr;
    ExtAttributes() = default;
    ExtAttributes(const ExtAttributes&) = delete;
    ExtAttributes& operator=(const ExtAttributes&) = delete;
    ~ExtAttributes() {
        if (raw != nullptr) ext2fs_xattrs_close(&raw);
    }
};

/// Reads an ext file system. Who changes one, derives from this.
class ExtFiles : public FileSystem {
public:
    explicit ExtFiles(std::shared_ptr<Disk> disk) : disk_(std::move(disk)), io_(*disk_) {}
    ~ExtFiles() override;

    /// `flags` as for ext2fs_open.
    Result<void> open(const Content& content, int flags);
    [[nodiscard]] Inode root() const override { return EXT2_ROOT_INO; }

protected:
    Result<FileSystemInfo> do_info() override;
    Result<FileInfo> do_stat(Inode inode) override;
    Result<std::vector<DirectoryEntry>> do_list(Inode directory, bool deleted, std::vector<Error>&) override;
    Result<DirectoryEntry> do_lookup(Inode directory, const std::string& name) override;
    Result<std::size_t> do_read(Inode inode, std::uint64_t at, std::span<std::byte> to) override;
    Result<std::vector<FileExtent>> do_extents(Inode inode, std::uint64_t at) override;
    Result<std::string> do_read_link(Inode inode) override;
    Result<std::vector<Attribute>> do_attributes(Inode inode) override;

    static ext2_ino_t number(Inode inode) { return static_cast<ext2_ino_t>(inode); }
    Result<void> verify(errcode_t code, const std::string& place) { return io_.verify(code, place); }
    /// The inode with this name. Errors: Errc::not_found.
    Result<Inode> find(Inode directory, const std::string& name);
    /// The inode, from memory if it was asked for just now.
    Result<ext2_inode_large> load(Inode inode);
    /// Refuses an inode of another type.
    Result<void> expect(Inode inode, FileType type);
    /// The inode as an open file, which stays open until another one is.
    Result<ext2_file_t> opened_file(Inode inode);
    void forget_file();

    std::shared_ptr<Disk> disk_;
    ExtIo io_;
    ext2_filsys fs_ = nullptr;
    std::string type_;
    Inode loaded_ = 0;  // what load() has in memory; 0: nothing

private:
    /// Refuses contents that are encrypted.
    Result<void> readable(Inode inode);
    Result<void> collect_extents(Inode inode, ext2_inode& raw, FileRuns& runs);
    Result<void> collect_blocks(Inode inode, ext2_inode& raw, FileRuns& runs);
    [[nodiscard]] std::uint64_t bytes_of(std::uint64_t blocks) const { return blocks * fs_->blocksize; }

    ext2_file_t file_ = nullptr;
    Inode file_inode_ = 0;
    ext2_inode_large inode_ = {};
};

/// Opens an ext file system to change it.
Result<std::unique_ptr<FileSystem>> change_ext(std::shared_ptr<Disk> disk, const Content& content);

}  // namespace qcow
