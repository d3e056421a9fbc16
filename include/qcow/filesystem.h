#pragma once
// What is inside of a disk: partitions, file systems, files.
//
// The readers of file systems are C libraries, and a disk may come from a stranger. A program that reads such disks
// should do it in a process without rights, as the commands of `qcow` do.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "qcow/disk.h"
#include "qcow/error.h"
#include "qcow/export.h"

namespace qcow {

// ---- Partitions ----

/// What a disk or partition holds, as its signatures say. Strings come from the disk: print them with printable().
struct Content {
    std::string type;   ///< the name that blkid uses: "ext4", "vfat", "xfs", "LVM2_member", ...; empty: not known
    std::string label;  ///< empty: none
    std::string uuid;   ///< empty: none
};

struct Partition {
    unsigned number = 0;      ///< as Linux counts: from 1; logical partitions of an MBR from 5
    GuestOffset start = {};   ///< of its first byte in the disk
    std::uint64_t bytes = 0;  ///< as recorded; it may reach past the end of the disk
    std::string type;         ///< a GUID in small letters, or the byte of an MBR as "0x83"
    std::string type_name;    ///< "Linux filesystem"; empty: not known
    std::string name;         ///< GPT only, UTF-8; empty: none
    std::string uuid;         ///< what Linux calls PARTUUID
    bool bootable = false;    ///< the active flag of an MBR, or "legacy BIOS bootable" of a GPT
    bool extended = false;    ///< it only holds logical partitions
    Content content = {};     ///< what is in it
};

struct PartitionTable {
    enum class Kind : std::uint8_t { none, mbr, gpt };
    Kind kind = Kind::none;
    std::string uuid;                   ///< of the disk: a GUID, or the id of an MBR as "0x1234abcd"
    unsigned sector_bytes = 512;        ///< 512 or 4096
    bool hybrid = false;                ///< a GPT whose MBR names partitions, too
    std::vector<std::string> warnings;  ///< what is odd or damaged, one sentence each, printable
    std::vector<Partition> partitions;  ///< in the order of their numbers
    Content content = {};               ///< of the disk itself: without a table, or an ISO 9660 image that has one
};

/// Returns the partitions of a disk. A GPT whose primary header or entries are damaged is read from its backup. At most
/// 1024 entries of a GPT and 256 logical partitions of an MBR are read. Errors: Errc::corrupt: an MBR announces a GPT,
/// and neither copy is valid; those of Disk::read.
QCOW_API Result<PartitionTable> list_partitions(Disk& disk);

/// Says what a disk without partition table holds. Errors: those of Disk::read.
QCOW_API Result<Content> identify(Disk& disk);

/// Returns a window onto a partition: reads and writes go to `disk`. The window ends where the disk ends.
/// Errors: Errc::not_found; Errc::corrupt: the partition begins past the end of the disk; those of list_partitions.
QCOW_API Result<std::shared_ptr<Disk>> partition_disk(std::shared_ptr<Disk> disk, unsigned number);

/// Returns the disk that holds a file system: partition `number`; without a number, the disk itself if it has no
/// partitions, else the only partition whose contents are known. Errors: Errc::invalid_argument: several partitions
/// could be meant, and the message lists them; those of partition_disk.
QCOW_API Result<std::shared_ptr<Disk>> file_system_disk(std::shared_ptr<Disk> disk, std::optional<unsigned> number);

/// Returns a window onto `range`, which must lie within the disk: Errc::invalid_argument.
QCOW_API Result<std::shared_ptr<Disk>> window(std::shared_ptr<Disk> disk, GuestRange range);

// ---- File systems ----

/// Names a file within a file system. File systems without inodes number their files.
using Inode = std::uint64_t;

enum class FileType : std::uint8_t {
    unknown,
    regular,
    directory,
    symbolic_link,
    character_device,
    block_device,
    fifo,
    socket
};

struct Timestamp {
    std::int64_t seconds = 0;  ///< since 1970, UTC
    std::uint32_t nanoseconds = 0;
    friend auto operator<=>(const Timestamp&, const Timestamp&) = default;
};

struct FileInfo {
    Inode inode = 0;
    FileType type = FileType::unknown;
    std::uint32_t mode = 0;  ///< permissions, with the bits set-user-ID, set-group-ID and sticky: at most 07777
    std::uint32_t user = 0;
    std::uint32_t group = 0;
    std::uint64_t links = 1;         ///< names that the file has
    std::uint64_t size = 0;          ///< bytes
    std::uint64_t stored_bytes = 0;  ///< bytes that the file takes on the disk, where the file system says so
    std::uint32_t major = 0;         ///< of a device
    std::uint32_t minor = 0;
    std::optional<Timestamp> modified;
    std::optional<Timestamp> accessed;
    std::optional<Timestamp> changed;
    std::optional<Timestamp> created;
    bool deleted = false;
    bool encrypted = false;  ///< contents and names of its entries cannot be read
};

struct DirectoryEntry {
    std::string name;  ///< bytes as stored; never empty, "." or "..", and without '/' and NUL
    Inode inode = 0;
    FileType type = FileType::unknown;
    bool deleted = false;
};

/// Bytes of a file that lie one behind the other.
struct FileExtent {
    std::uint64_t at = 0;               ///< in the file
    std::uint64_t length = 0;           ///< bytes, never 0
    std::optional<GuestOffset> stored;  ///< where the bytes lie in the disk; none: they are zeros
};

struct Attribute {
    std::string name;  ///< with its namespace: "user.mime_type", "security.capability"
    std::vector<std::byte> value;
};

struct FileSystemInfo {
    std::string type;  ///< as of Content
    std::string label;
    std::string uuid;
    std::uint64_t block_bytes = 0;
    std::uint64_t bytes = 0;                   ///< of the whole file system
    std::optional<std::uint64_t> free_bytes;   ///< none: not known
    std::optional<std::uint64_t> inodes;       ///< none: without inodes, or not known
    std::optional<std::uint64_t> free_inodes;  ///< none: without inodes, or not known
    std::vector<std::string> warnings;         ///< one sentence each, printable
};

/// A file to be made. `size` and `links` of `info` are not used.
struct NewNode {
    FileInfo info = {};
    std::string link_target = {};  ///< of a symbolic link
    std::vector<Attribute> attributes = {};
};

/// The files of a disk.
///
/// Errors of all functions: Errc::corrupt: the file system is damaged; Errc::not_found: there is no such inode or name;
/// Errc::encrypted; Errc::limit_exceeded; Errc::unsupported: the file system does not have or this library does not
/// support it; those of Disk.
/// Thread safety: one thread at a time.
class QCOW_API FileSystem {
public:
    /// The longest list, link target or attribute that is read, so that damage cannot take all memory.
    static constexpr std::size_t most_entries = std::size_t{4} << 20;
    static constexpr std::size_t longest_link = 65536;
    static constexpr std::size_t longest_attribute = std::size_t{1} << 20;
    static constexpr std::size_t most_extents = 65536;

    FileSystem() = default;
    FileSystem(const FileSystem&) = delete;
    FileSystem& operator=(const FileSystem&) = delete;
    virtual ~FileSystem() = default;

    Result<FileSystemInfo> info();
    /// The root directory.
    [[nodiscard]] virtual Inode root() const = 0;
    Result<FileInfo> stat(Inode inode);
    /// Returns the entries of a directory, with those that were deleted if asked to. Entries that cannot be read, and
    /// names that no directory can have, are errors. If `refused` is given, it gets these errors, at most 100, and the
    /// other entries are returned.
    Result<std::vector<DirectoryEntry>> list(Inode directory, bool deleted = false,
                                             std::vector<Error>* refused = nullptr);
    /// Returns the entry of a directory with this name, without listing all others where the file system can do so.
    /// Its type is never unknown. Errors: Errc::not_found: there is none.
    Result<DirectoryEntry> lookup(Inode directory, const std::string& name);
    /// Reads contents. Returns the bytes read: fewer than `to` has only at the end of the file.
    Result<std::size_t> read(Inode inode, std::uint64_t at, std::span<std::byte> to);
    /// Says where the contents from `at` on lie: extents without gaps between them, at most `most_extents`, that end
    /// with the file if they are fewer. Errors: Errc::unsupported: the contents do not lie in the disk as they are.
    Result<std::vector<FileExtent>> extents(Inode inode, std::uint64_t at = 0);
    Result<std::string> read_link(Inode inode);
    Result<std::vector<Attribute>> attributes(Inode inode);

    // Changes. Only ext2, ext3, ext4 and FAT, on a disk that is open for writing, and opened with Access::write.

    // Errors: Errc::invalid_argument: this is not to be changed, or the file system cannot hold such a thing;
    // Errc::not_found: the file was removed; Errc::no_space: nothing stays halfway, except what write() wrote. Other
    // failures halfway leave ext marked as not clean, for e2fsck.

    /// Makes a file without contents, and returns it. Errors: Errc::invalid_argument: the name is taken, the type is
    /// unknown, a link has no target, or an attribute is none that Linux has; Errc::unsupported: FAT has no attributes.
    Result<Inode> create(Inode directory, const std::string& name, const NewNode& node);
    /// Writes contents of a regular file, and makes it as long as necessary.
    Result<void> write(Inode inode, std::uint64_t at, std::span<const std::byte> from);
    /// Makes a regular file `size` bytes long. What is added reads as zeros.
    Result<void> truncate(Inode inode, std::uint64_t size);
    /// Removes a name, and the file if it has no other. Errors: Errc::invalid_argument: a directory that is not empty.
    Result<void> remove(Inode directory, const std::string& name);
    /// Gives the file `from` the name `to` of a file in the same directory, and removes that file as remove() does.
    /// Needs no space. If both are the same file, nothing changes. Errors: Errc::invalid_argument: one of the two is a
    /// directory.
    Result<void> replace(Inode directory, const std::string& from, const std::string& to);
    /// Completes the changes, and makes them durable. Every later call is an error: Errc::invalid_argument.
    Result<void> close();

protected:
    virtual Result<FileSystemInfo> do_info() = 0;
    virtual Result<FileInfo> do_stat(Inode inode) = 0;
    /// Names are not verified. `refused` gets errors of single entries.
    virtual Result<std::vector<DirectoryEntry>> do_list(Inode directory, bool deleted, std::vector<Error>& refused) = 0;
    virtual Result<DirectoryEntry> do_lookup(Inode directory, const std::string& name);
    virtual Result<std::size_t> do_read(Inode inode, std::uint64_t at, std::span<std::byte> to) = 0;
    virtual Result<std::vector<FileExtent>> do_extents(Inode inode, std::uint64_t at);
    virtual Result<std::string> do_read_link(Inode inode);
    virtual Result<std::vector<Attribute>> do_attributes(Inode inode);
    virtual Result<Inode> do_create(Inode directory, const std::string& name, const NewNode& node);
    virtual Result<void> do_write(Inode inode, std::uint64_t at, std::span<const std::byte> from);
    virtual Result<void> do_truncate(Inode inode, std::uint64_t size);
    virtual Result<void> do_remove(Inode directory, const std::string& name);
    /// Two files, and none is a directory.
    virtual Result<void> do_replace(Inode directory, const DirectoryEntry& from, const DirectoryEntry& to);
    virtual Result<void> do_close();

private:
    /// Does the work of a public function, unless the file system was closed.
    template <class Work>
    std::invoke_result_t<Work> run(Work&& work);

    bool closed_ = false;
};

enum class Access : std::uint8_t {
    read,
    read_damaged,  ///< what has a wrong checksum is no error, but read as it is (ext; the others have no checksums)
    write
};

/// Opens the file system that a disk or partition holds. Read by: libext2fs (ext2, ext3, ext4), The Sleuth Kit (FAT,
/// exFAT, NTFS, HFS+, UFS, YAFFS2), libsquashfs, libarchive (ISO 9660, tar, cpio, zip, 7z).
/// Errors: Errc::unsupported: nothing reads what the disk holds, or the library was built without its reader, or it
/// cannot be written; the message names it. Errc::corrupt.
QCOW_API Result<std::unique_ptr<FileSystem>> open_file_system(std::shared_ptr<Disk> disk, Access access = Access::read);

/// Loads the libraries that open_file_system loads when it needs them. For a process that is about to give up the right
/// to open files.
QCOW_API void load_file_systems();

/// Returns the file at a path. "/" separates names. Symbolic links are followed within the file system, the last one
/// only if `follow` is true. Errors: Errc::not_found; Errc::invalid_argument: a name in front of a "/" is no directory;
/// Errc::limit_exceeded: more than 40 links.
QCOW_API Result<Inode> find_path(FileSystem& files, std::string_view path, bool follow = true);

/// A file that walk() visits.
struct Visited {
    std::string path;  ///< relative to where the walk began; empty for that itself
    DirectoryEntry entry;
    FileInfo info;
    unsigned depth = 0;  ///< 0 for where the walk began
};

/// Whether a walk enters a directory.
enum class Descend : bool { no, yes };

struct WalkOptions {
    bool deleted = false;  ///< also visit deleted entries
    /// Receives errors of single files, directories and entries. The walk goes on with the others. If unset, it ends.
    std::function<void(const std::string& path, const Error& error)> failed = {};
};

/// Visits a file, and all files below it if it is a directory, sorted by name, parents first. Each directory is entered
/// once, so a loop in a damaged file system ends.
QCOW_API Result<void> walk(FileSystem& files, Inode start, const WalkOptions& options,
                           const std::function<Result<Descend>(const Visited&)>& visit);

// ---- Files for this machine ----

/// A file that is extracted, with all below it.
struct ExtractItem {
    Inode inode = 0;
    std::string name;        ///< its new name; empty: what is in a directory becomes the contents of the target itself
    std::string shown = {};  ///< what stands in front of the paths below it in errors; empty: nothing
};

struct ExtractOptions {
    /// The disk that the file system was opened on. Contents that lie in it as they are, are read from it by several
    /// threads.
    Disk* disk = nullptr;
    unsigned workers = 0;  ///< threads that read and write contents; 0: one per processor
    /// Receives what could not be kept, once per kind ("owners", ...), and errors of single files. If unset, the first
    /// file that cannot be extracted ends the work.
    std::function<void(const std::string& path, const Error& error)> failed = {};
    std::function<void(std::uint64_t bytes)> progress = {};  ///< receives the bytes of contents that are done
};

struct ExtractReport {
    std::uint64_t files = 0;  ///< files, directories, links and nodes made
    std::uint64_t bytes = 0;  ///< of contents
    std::uint64_t failed = 0;
    std::vector<std::string> not_kept;  ///< kinds of properties that this process may not set: "owners", "device nodes"
};

/// Copies files to the directory `target` of this machine. Keeps owners, modes, times, hard links, symbolic links,
/// holes, device nodes and extended attributes, as far as this process may set them.
/// Nothing outside of `target` is made or changed: no symbolic link is followed, and nothing that exists is replaced.
/// Directories that exist get the new entries.
/// Errors: those of FileSystem; Errc::refused_by_policy: a name that would lead out of the target;
/// Errc::invalid_argument: something with the name exists; Errc::io, no_space, access_denied.
QCOW_API Result<ExtractReport> extract(FileSystem& files, const std::vector<ExtractItem>& items,
                                       const std::string& target, const ExtractOptions& options = {});

/// Reads the contents of a file, in order: each piece is at most 1 MiB. `disk` as for ExtractOptions.
QCOW_API Result<void> read_contents(FileSystem& files, Inode inode, Disk* disk, unsigned workers,
                                    const std::function<Result<void>(std::span<const std::byte>)>& take);

/// Writes files as one tar archive (pax format) to a file descriptor. If the name of an item is empty, the names in the
/// directory have nothing in front. Options as for extract. Sockets are left out. Errors: Errc::unsupported: the
/// library was built without libarchive; Errc::invalid_argument: two items have the same name; those of FileSystem;
/// Errc::io.
QCOW_API Result<ExtractReport> write_tar(FileSystem& files, const std::vector<ExtractItem>& items, int descriptor,
                                         const ExtractOptions& options = {});

}  // namespace qcow
