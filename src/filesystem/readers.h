#pragma once
// The readers of file systems, one for each library.

#include <memory>

#include "qcow/filesystem.h"

namespace qcow {

// Each returns the file system that `disk` holds. `content` is what identify() says of it.

Result<std::unique_ptr<FileSystem>> open_ext(std::shared_ptr<Disk> disk, const Content& content, Access access);
Result<std::unique_ptr<FileSystem>> open_sleuth(std::shared_ptr<Disk> disk, const Content& content);
/// Opens a FAT file system to change it. Only open_sleuth knows deleted files.
Result<std::unique_ptr<FileSystem>> change_fat(std::shared_ptr<Disk> disk, const Content& content);
Result<std::unique_ptr<FileSystem>> open_squash(std::shared_ptr<Disk> disk, const Content& content);
Result<std::unique_ptr<FileSystem>> open_archive(std::shared_ptr<Disk> disk, const Content& content);

/// Loads the locale that open_archive needs, for a process that is about to give up the right to open files.
void load_archive_locale();

/// Whether a directory can have an entry with this name: neither empty, "." nor "..", at most 4096 bytes, without '/'
/// and NUL.
bool is_entry_name(std::string_view name);

/// The greatest numbers of a device that Linux and ext have.
constexpr std::uint32_t most_major = 0xfff;
constexpr std::uint32_t most_minor = 0xfffff;

/// The place of an error in a file.
std::string inode_place(Inode inode);

/// The type in the bits of a Unix mode.
FileType type_of_mode(std::uint32_t mode);
/// The bits of a Unix mode for a type.
std::uint32_t mode_of_type(FileType type);

}  // namespace qcow
