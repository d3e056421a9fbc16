#pragma once
// Builds disks from directories, archives and other disks, by a specification.

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "qcow/create.h"

namespace qcow {

/// The 16 bytes of a UUID, in the order in which its text shows them.
using Uuid = std::array<std::uint8_t, 16>;

/// Returns the UUID as text, such as "0fc63daf-8483-4772-8e79-3d69d8477de4".
QCOW_API std::string uuid_text(const Uuid& uuid);

/// Parses that text, in either case. Returns nothing for other texts.
QCOW_API std::optional<Uuid> parse_uuid(std::string_view text);

/// Where the keys of a table are in the text of a specification: "size" is at "disk.toml:8:8", "source 2" is the second
/// one of a list, and "" is the table itself. Only for messages; empty without a text.
using KeyPlaces = std::map<std::string, std::string, std::less<>>;

/// A file that a specification adds to a tree, or one of the tree that it changes. Members that are unset keep what the
/// tree has. New files belong to root. They have mode 0644, directories 0755, and links 0777.
struct FileSpec {
    enum class Kind : std::uint8_t {
        change,     ///< a file that the tree has: only its owner, mode and time change
        regular,    ///< a regular file with `content` or the contents of `source`
        directory,  ///< is made, or stays with what is in it
        symlink,    ///< leads to `target`
        hardlink,   ///< another name of the file `target`
        character_device,
        block_device,
        fifo,
        socket,
        remove,  ///< a file that the tree has, and a directory with all that is in it, is left out
    };
    std::string path;  ///< within the file system, with or without a slash in front; directories above it are made
    Kind kind = Kind::change;
    std::string content = {};  ///< the contents of a regular file, if `source` is empty
    std::string source = {};   ///< the regular file that has the contents
    std::string target = {};
    unsigned major = 0;  ///< of devices
    unsigned minor = 0;
    std::optional<unsigned> mode = {};  ///< permissions, 0 to 07777
    std::optional<std::uint32_t> uid = {};
    std::optional<std::uint32_t> gid = {};
    std::optional<std::int64_t> mtime = {};  ///< seconds since 1970
    KeyPlaces places = {};
};

/// A file system, and what is put into it. Plain data.
struct FilesystemSpec {
    enum class Type : std::uint8_t {
        ext2,
        ext3,
        ext4,
        fat12,
        fat16,
        fat32,
        vfat,  ///< FAT12, FAT16 or FAT32, as the size requires
        swap,
        raw,  ///< the bytes of the only source
    };
    Type type = Type::ext4;
    /// A directory, a tar archive, an image, or "IMAGE:N": partition N of an image. Several are layers: a later one is
    /// put over the earlier ones, and its whiteouts (OCI's ".wh." files, overlayfs's character devices 0:0 and opaque
    /// directories) remove files of those. For `raw`, one image or partition.
    std::vector<std::string> sources = {};
    std::vector<FileSpec> files = {};  ///< carried out in this order, after all sources
    std::string label = {};
    std::optional<Uuid> uuid = {};                 ///< derived from the seed, if unset; FAT takes its first four bytes
    std::optional<std::uint64_t> size = {};        ///< bytes; a partition's size is more important
    std::optional<std::uint32_t> block_size = {};  ///< bytes; ext: 1024, 2048 or 4096 (the default); FAT: a cluster
    std::optional<std::int64_t> mtime = {};        ///< the time of files without FileSpec::mtime, in seconds since 1970
    /// Space to leave when the size is fitted to the files: bytes, and percent of what the files take.
    std::uint64_t free_bytes = 0;
    unsigned free_percent = 0;
    bool root_owns_all = false;  ///< every file of the sources belongs to root
    /// Settings of a type. ext: "journal_blocks", "inodes", "inode_size", "reserved_percent", and a feature of ext by
    /// its name with "on" or "off". FAT: "sectors_per_track", "heads", "hidden_sectors".
    std::map<std::string, std::string> options = {};
    KeyPlaces places = {};  ///< an option is "options.NAME"
};

/// The type of a partition: for GPT, for MBR, or for both.
struct PartitionType {
    std::optional<Uuid> guid = {};
    std::optional<std::uint8_t> mbr = {};
};

/// Parses a type: a name such as "esp" or "linux", a GUID, or a byte such as "0x83". A name stands for a type in both
/// tables, as far as these have it; the same holds for known GUIDs and bytes. Errors: Errc::invalid_argument.
QCOW_API Result<PartitionType> parse_partition_type(std::string_view text);

/// A partition. Plain data.
struct PartitionSpec {
    std::string name = {};  ///< GPT: at most 36 UTF-16 units; MBR: only for messages
    PartitionType type = {};
    std::optional<std::uint64_t> size = {};         ///< bytes; if unset, fitted to the file system
    bool remaining = false;                         ///< takes what is left of a disk that has a size; excludes `size`
    std::optional<std::uint64_t> offset = {};       ///< bytes; if unset, behind the partition before it
    std::uint64_t align = 1 << 20;                  ///< bytes; a power of two
    std::optional<Uuid> uuid = {};                  ///< GPT only; derived from the seed, if unset
    bool bootable = false;                          ///< MBR: active, at most one; GPT: legacy BIOS bootable
    std::optional<FilesystemSpec> filesystem = {};  ///< none: zeros
    KeyPlaces places = {};
};

/// What to build. Plain data.
struct BuildSpec {
    enum class Table : std::uint8_t { none, gpt, mbr };
    Table table = Table::none;
    /// Of the disk, in bytes. If unset: as large as the parts require; for a GPT on a block device, as the device.
    std::optional<std::uint64_t> size = {};
    unsigned sector_size = 512;     ///< 512 or 4096
    std::optional<Uuid> uuid = {};  ///< the disk's GUID; for MBR, its first four bytes are the disk signature
    std::string seed = {};          ///< UUIDs that are unset are derived from it. Empty: from the specification,
                                    ///< and from all properties of the files but their contents
    std::string boot_code = {};     ///< a file whose first 440 bytes go into the first sector; empty: none
    std::vector<PartitionSpec> partitions = {};     ///< at least one, unless `table` is none
    std::optional<FilesystemSpec> filesystem = {};  ///< the whole disk, if `table` is none
    KeyPlaces places = {};                          ///< of the table [image]
};

/// The longest specification, in bytes.
inline constexpr std::size_t longest_build_spec = std::size_t{16} << 20;

/// Parses a specification in TOML; docs/build.md describes it. `name` is the file that the text is from. Relative names
/// of sources are resolved against `directory`.
///
/// Errors: Errc::invalid_argument, with name, line and column, for text that is not TOML, for keys that are unknown
/// (with the nearest known one), and for values that are out of range or exclude each other; Errc::unsupported in a
/// build without toml++.
QCOW_API Result<BuildSpec> parse_build_spec(std::string_view text, const std::string& name,
                                            const std::string& directory);

/// What to build, and into what. Plain data.
struct BuildJob {
    BuildSpec spec;
    NewImage target = {};           ///< a backing file gets only what differs from it stored in the target
    bool compress = false;          ///< only for a qcow2 target
    std::optional<int> level = {};  ///< see ConvertOptions::level
    unsigned workers = 0;           ///< threads; 0: one per processor
    KeySource keys = {};            ///< of images among the sources: see OpenOptions::keys
    /// Further files that the job depends on, such as that of the specification. They are not overwritten.
    std::vector<std::string> inputs = {};
    /// The time of the build, in seconds since 1970 (SOURCE_DATE_EPOCH). File systems record it as their own, and later
    /// times of files become this time. If unset, a file system records the latest time of its files.
    std::optional<std::int64_t> time = {};
};

/// A part of a disk that was built: a partition, or the file system of the whole disk.
struct BuiltPart {
    std::string name;
    std::uint64_t offset = 0;  ///< bytes
    std::uint64_t size = 0;    ///< bytes
    std::uint64_t files = 0;   ///< of all kinds, with directories
    std::uint64_t free = 0;    ///< bytes that files can still take
};

struct BuildResult {
    std::string path;               ///< the target's
    std::uint64_t size = 0;         ///< of the disk, in bytes
    std::vector<BuiltPart> parts;   ///< in the order of the specification
    std::vector<Warning> warnings;  ///< all warnings that JobControl::warn received
};

/// Builds a disk. First lists the files and plans where everything goes; then copies the files' contents to the target,
/// with all workers, in the order of the disk. Makes no temporary copy of the disk: only the metadata of file systems
/// are in memory, above 32 MiB in an unnamed temporary file, and the contents of archives in another one.
///
/// The same specification and sources give the same bytes, on any machine and for any number of workers. The target
/// gets its name when it is complete, and no source is ever overwritten: see convert().
///
/// Progress is in bytes of the disk.
/// Errors: Errc::no_space, before anything is written, if the files do not fit; Errc::invalid_argument for options that
/// exclude each other, and for files that a file system cannot hold; Errc::corrupt for a damaged archive or source;
/// Errc::io for a file that changes while it is read; Errc::refused_by_policy for names in archives that lead out of
/// the tree; Errc::unsupported for what this build lacks a library for; Errc::cancelled; those of reading and writing.
/// Thread safety: jobs may run at the same time.
QCOW_API Result<BuildResult> build(const BuildJob& job, const JobControl& control = {});

}  // namespace qcow
