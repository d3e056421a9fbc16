#pragma once
// Image: a Disk that is stored in one of the formats, and what its metadata say about it.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "qcow/check.h"
#include "qcow/disk.h"
#include "qcow/format.h"
#include "qcow/location.h"
#include "qcow/storage.h"

namespace qcow {

/// How compressed clusters are: raw deflate ("zlib") or zstd.
enum class Compression : std::uint8_t { zlib = 0, zstd = 1 };

/// A file that an image names: someone else's wish, until a Gate grants it.
struct FileReference {
    enum class Role : std::uint8_t { backing_file, data_file };
    Role role = Role::backing_file;
    std::string name;       ///< exactly as the image has it: a path, "file:..." or "json:{...}"
    Location location;      ///< what the name comes to; a relative path is resolved against the directory of `named_by`
    std::string named_by;   ///< the name of the Storage that holds the image
    bool writable = false;  ///< it is to be written: the data file of an image that is
    /// That what names it is an image was only told from its first bytes, which a guest may have written. Of layers
    /// below the topmost one such references are never granted: they do not come here.
    bool guessed = false;
};

/// Decides what becomes of a file that an image names: opens it, or refuses with Errc::refused_by_policy.
using Gate = std::function<Result<std::shared_ptr<Storage>>(const FileReference&)>;

/// Refuses every file.
QCOW_API Gate no_files();

/// Opens whatever file or block device is named, as the user of the process: for images that are trusted. Read-only,
/// unless FileReference::writable asks for more. FileOptions say what `force_share` means to files that are read, and
/// `direct` to those that are written.
QCOW_API Gate local_files(bool force_share = false, bool direct = false);

/// For images from strangers: opens regular files that lie in `directory` or below, which is that of the topmost image
/// (the part of its Storage's name before the last slash; empty: the current directory). Neither "..", nor symbolic
/// links, nor what another process changes meanwhile leads out of it. Refused are absolute paths, "json:" descriptions,
/// everything that is no regular file, and whatever an image names that was not said to be one (OpenOptions::format):
/// a guest can make its raw disk look like an image. The options are those of local_files. Errc::refused_by_policy;
/// unsupported where the kernel cannot keep names within a directory (before Linux 5.6).
QCOW_API Gate files_beneath(const std::string& directory, bool force_share = false, bool direct = false);

/// When writes reach the disk.
enum class CacheMode : std::uint8_t {
    writeback,     ///< with the next flush
    writethrough,  ///< before the write returns
    unsafe,        ///< when the operating system likes: flushes are ignored, and a power loss may destroy the image
};

/// What becomes of writes that consist of zeros.
enum class DetectZeroes : std::uint8_t {
    off,    ///< they are written
    on,     ///< they become write_zeroes that keep their storage, block by block
    unmap,  ///< and give it up
};

/// How an image that is open for writing behaves. Its enabled bitmaps are marked as in_use before the first change, and
/// saved by Image::close. What does not fit into memory (see OpenOptions::cache_bytes) or is damaged stays in_use.
struct WriteOptions {
    CacheMode cache = CacheMode::writeback;
    /// Whether Disk::discard does anything, and storage that is no longer used is given back to the file system.
    bool discard = true;
    DetectZeroes detect_zeroes = DetectZeroes::off;
    /// Counts all references when the image is opened. An image whose refcounts are too low, or whose file or data file
    /// was cut, is marked as corrupt and refused, before a write could destroy what it holds. It takes as long as
    /// Image::check, about 0.1 s for 1 TiB of mapped disk, and for that time four bytes a host cluster in use; an image
    /// that would need more than 256 MiB is not counted. False: refcounts and file lengths are believed. Only the
    /// clusters of metadata are then known, and never handed out.
    bool verify_refcounts = true;
};

struct OpenOptions {
    /// The image itself can be written; its Storage must be writable. Backing files never are. A dirty image has its
    /// refcounts rebuilt; one that is marked corrupt is refused.
    bool writable = false;
    WriteOptions write = {};  ///< where it is writable
    /// Nothing: told from the contents. What is not qcow or qcow2 is then raw; but not what has the signature of
    /// something else (VMDK, VHD, LUKS, gzip, a web page, ...), nor what is called "x.qcow2" and looks like nothing:
    /// Errc::unsupported, with its name and the remedy. The same holds for backing files without a recorded format.
    std::optional<Format> format = {};
    /// What lies below the image, in place of the file that its header names. Null: nothing, so that what the image
    /// does not hold itself reads as zeros; only for reading (Errc::invalid_argument), and `warn` is told.
    std::optional<std::shared_ptr<Storage>> backing = {};
    /// The format of the backing file, named by the header or given here; nothing: what the header records, else told
    /// from the contents.
    std::optional<Format> backing_format = {};
    /// What happens to backing files and external data files. Nothing is opened that it does not open.
    Gate gate = no_files();
    /// False: this image alone. What it says of itself can be asked; reading what lies in other files fails.
    bool follow = true;
    /// Memory for cached metadata, in bytes, for the whole chain. The bits of enabled bitmaps that are written to may
    /// take a quarter of that again, and 4 MiB in any case.
    std::size_t cache_bytes = std::size_t{32} << 20;
    /// Told what is odd but not wrong, a sentence at a time.
    std::function<void(const std::string&)> warn = {};
};

struct Feature {
    enum class Kind : std::uint8_t { incompatible, compatible, autoclear };
    Kind kind = Kind::incompatible;
    unsigned bit = 0;
    std::string name;    ///< from the specification, else from the image's own feature name table, else "bit N"
    bool known = false;  ///< to this library
};

struct SnapshotInfo {
    std::string id;
    std::string name;
    std::uint64_t date_seconds = 0;  ///< since 1970
    std::uint32_t date_nanoseconds = 0;
    std::uint64_t vm_clock_nanoseconds = 0;
    std::uint64_t vm_state_bytes = 0;
    std::uint64_t virtual_size = 0;
    std::optional<std::uint64_t> icount;
};

struct BitmapInfo {
    std::string name;
    std::uint64_t granularity = 0;  ///< guest bytes a bit
    bool in_use = false;            ///< being written, or a writer did not close it: the file's bits cannot be trusted
    bool enabled = false;           ///< QEMU's "auto": every write is to be recorded
};

/// A run of guest bytes whose bits in a bitmap are alike.
struct DirtyRun {
    GuestOffset start = {};
    std::uint64_t length = 0;  ///< bytes, never 0
    bool dirty = false;
};

struct EncryptionInfo {
    std::string method;  ///< "aes" or "luks"
    std::string cipher;  ///< e.g. "aes-128-cbc", "aes-xts-plain64"
    std::string hash;    ///< LUKS: what the key is derived with; else empty
    unsigned key_bits = 0;
    unsigned slots = 0;  ///< LUKS: key slots there are
    std::vector<unsigned> used_slots;
};

struct ReferenceInfo {
    std::string name;    ///< as the image has it
    std::string path;    ///< resolved; empty where it cannot be
    std::string format;  ///< as recorded; empty: not recorded
};

struct ExtensionInfo {
    std::uint32_t type = 0;
    std::uint32_t length = 0;
};

/// What header and tables say, without a walk over the mapping.
struct ImageInfo {
    std::string filename;
    Format format = Format::raw;
    std::uint64_t virtual_size = 0;
    std::uint64_t file_size = 0;
    std::uint64_t disk_size = 0;     ///< bytes that the file occupies
    unsigned version = 0;            ///< 0 for raw
    std::uint64_t cluster_size = 0;  ///< bytes; 0 for raw
    std::string compression;         ///< "zlib" or "zstd"; empty for raw
    unsigned refcount_bits = 0;      ///< 0 where there are none
    bool dirty = false;
    bool corrupt = false;
    bool lazy_refcounts = false;
    bool extended_l2 = false;
    std::vector<Feature> features;  ///< the bits that are set
    std::optional<ReferenceInfo> backing;
    std::optional<ReferenceInfo> data_file;
    bool data_file_raw = false;
    std::optional<EncryptionInfo> encryption;
    std::vector<SnapshotInfo> snapshots;
    std::vector<BitmapInfo> bitmaps;
    bool bitmaps_stale = false;  ///< there are bitmaps, but a writer that does not know them has been here
    std::vector<ExtensionInfo> unknown_extensions;
    // Why these could not be read, where they are damaged. The rest is right all the same.
    std::optional<Error> encryption_error;
    std::optional<Error> snapshots_error;
    std::optional<Error> bitmaps_error;
};

/// Guests count disks in sectors. A new or resized image has a whole number of them. Of an image that has not, the last
/// byte can be read all the same.
inline constexpr std::uint64_t sector_bytes = 512;

/// The virtual size that an image gets where `bytes` are asked for: as many sectors as they need.
constexpr std::uint64_t rounded_size(std::uint64_t bytes) {
    const std::uint64_t part = bytes % sector_bytes;
    // What no disk can be large enough for is left as it is, to be refused.
    return part == 0 || bytes > std::uint64_t{1} << 63 ? bytes : bytes - part + sector_bytes;
}

/// An opened image. Thread safety: that of every Disk, where a function does not say otherwise.
class QCOW_API Image : public Disk {
public:
    [[nodiscard]] virtual Format format() const = 0;

    /// The names of the files that this layer lies in, as they were opened: the image, and its data file if it has one.
    [[nodiscard]] virtual std::vector<std::string> files() const = 0;

    /// The layer below; nothing where there is none or it was not followed.
    [[nodiscard]] virtual std::shared_ptr<Image> backing() const { return nullptr; }

    /// Everything that can be said without a walk.
    [[nodiscard]] Result<ImageInfo> info() const;

    /// An internal snapshot, found by id, else by name, as a read-only disk of its own that keeps the image open.
    Result<std::shared_ptr<Disk>> snapshot(std::string_view id_or_name);

    /// Visits what a persistent bitmap says of [begin, begin + length), in guest order: dirty and clean runs by turns.
    /// Of an image that is open for writing they include every request that completed before the call; a request in
    /// flight may be included or not. Stops at the first error, of the image or of `visit`. Errors: Errc::not_found: no
    /// such bitmap; corrupt: it is in_use, so that its bits cannot be trusted, or damaged; unsupported: it has extra
    /// data that have to be understood; invalid_argument: the range does not lie within the disk.
    Result<void> each_dirty(std::string_view bitmap, GuestOffset begin, std::uint64_t length,
                            const std::function<Result<void>(const DirtyRun&)>& visit);

    /// Verifies the metadata of this image, not of its backing files. Errors: Errc::unsupported for formats that have
    /// none. The image must not be written meanwhile.
    Result<CheckReport> check(const CheckOptions& options);

    /// Writes whole clusters in compressed form: `at` is a multiple of block_size(), and so is the end of the range,
    /// unless it is the end of the disk. What does not become smaller is stored as it is. Errors: Errc::unsupported for
    /// formats that have no compression. `level`: see ConvertOptions.
    Result<void> write_compressed(GuestOffset at, std::span<const std::byte> from,
                                  std::optional<int> level = std::nullopt);

    enum class Shrink : bool { refuse, allow };

    /// Changes the virtual size to rounded_size(size) bytes; new bytes read as zeros. It becomes smaller
    /// only where that is allowed: what lies past the new end is lost. Requests past the smaller of both sizes must not
    /// be in flight. On an error size() tells which of both the image has. Bitmaps become of the new size, new bits
    /// clean; those that would no longer fit into memory, or are damaged, become in_use. What a smaller disk leaves at
    /// the end of the file is cut off by close().
    Result<void> resize(std::uint64_t size, Shrink shrink = Shrink::refuse);

    /// Flushes, and leaves the file as if there had been no writer: everything that was only reserved is given back. No
    /// other request may be in flight; afterwards the image can be read, and no longer written. Without it the
    /// destructor does the same, but nobody learns of errors.
    Result<void> close();

protected:
    // What an image does: see Disk.

    [[nodiscard]] virtual Result<ImageInfo> do_info() const = 0;
    virtual Result<std::shared_ptr<Disk>> do_snapshot(std::string_view id_or_name);
    virtual Result<void> do_each_dirty(std::string_view bitmap, GuestOffset begin, std::uint64_t length,
                                       const std::function<Result<void>(const DirtyRun&)>& visit);
    virtual Result<CheckReport> do_check(const CheckOptions& options);
    virtual Result<void> do_write_compressed(GuestOffset at, std::span<const std::byte> from, std::optional<int> level);
    /// `size` is another one than that of the disk, and rounded.
    virtual Result<void> do_resize(std::uint64_t size);
    virtual Result<void> do_close();
};

/// Opens an image, and the chain below it as far as `options` allow. Memory is bounded by the cache budget and the
/// length of the chain (4096 files at most; where a process may not have as many open, Errc::limit_exceeded), whatever
/// the image claims. Reading needs the header and the mapping: refcounts, snapshots and bitmaps may be damaged.
QCOW_API Result<std::shared_ptr<Image>> open_image(std::shared_ptr<Storage> storage, const OpenOptions& options = {});

}  // namespace qcow
