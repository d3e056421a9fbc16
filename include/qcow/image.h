#pragma once
// Image: a Disk that is stored in one of the formats, and its metadata.

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
#include "qcow/key.h"
#include "qcow/location.h"
#include "qcow/snapshots.h"
#include "qcow/storage.h"

namespace qcow {

struct BitmapAction;

/// The compression of clusters: raw deflate ("zlib") or zstd.
enum class Compression : std::uint8_t { zlib = 0, zstd = 1 };

/// A file that an image names. It is opened only if a Gate allows it.
struct FileReference {
    enum class Role : std::uint8_t { backing_file, data_file };
    Role role = Role::backing_file;
    std::string name;       ///< exactly as recorded: a path, "file:..." or "json:{...}"
    Location location;      ///< the name, parsed; a relative path is resolved against the directory of `named_by`
    std::string named_by;   ///< the name of the image's Storage
    bool writable = false;  ///< the file will be written: the data file of an image that is open for writing
    /// The format of the naming image was guessed from its first bytes, which a guest may have written. A guessed layer
    /// below the topmost one never gets its files, so its references do not reach the gate.
    bool guessed = false;
};

/// Opens a file that an image names, or refuses it with Errc::refused_by_policy.
using Gate = std::function<Result<std::shared_ptr<Storage>>(const FileReference&)>;

/// Returns a gate that refuses every file.
QCOW_API Gate no_files();

/// Returns a gate for trusted images. It opens any file or block device that the process may open, read-only unless
/// FileReference::writable is set. `force_share` holds for files that are read, `direct` for those that are written:
/// see FileOptions.
QCOW_API Gate local_files(bool force_share = false, bool direct = false);

/// Returns a gate for images that are not trusted. It opens regular files in `directory` or below. `directory` is that
/// of the topmost image: its Storage's name up to the last slash; empty: the current directory. "..", symbolic links,
/// and changes by another process at the same time do not lead out of it. The options are those of local_files.
///
/// The gate refuses absolute paths, "json:" descriptions and files that are not regular. It also refuses what an image
/// names whose format was guessed (no OpenOptions::format): a guest can make its raw disk look like an image.
/// Errors of the gate: Errc::refused_by_policy; Errc::unsupported before Linux 5.6, which cannot keep names within a
/// directory; those of open_file.
QCOW_API Gate files_beneath(const std::string& directory, bool force_share = false, bool direct = false);

/// When writes become durable.
enum class CacheMode : std::uint8_t {
    writeback,     ///< at the next flush
    writethrough,  ///< before the write returns
    unsafe,        ///< at any time: flushes do nothing, and a power loss may destroy the image
};

/// What happens to writes of zeros.
enum class DetectZeroes : std::uint8_t {
    off,    ///< they are written
    on,     ///< zeros become write_zeroes that keep their storage, block by block
    unmap,  ///< zeros become write_zeroes that release their storage, block by block
};

/// How an image is written. Enabled bitmaps are marked in_use before the first change, and saved by Image::close. A
/// bitmap that is damaged or does not fit into memory (see OpenOptions::cache_bytes) stays in_use.
struct WriteOptions {
    CacheMode cache = CacheMode::writeback;
    /// If true, Disk::discard works, and unused storage is given back to the file system. If false, neither happens.
    bool discard = true;
    DetectZeroes detect_zeroes = DetectZeroes::off;
    /// If true, opening counts all references of the image. If refcounts are too low, or data were cut off the file or
    /// the data file, opening marks the image as corrupt and fails: a write could destroy data. Cost: the time of
    /// Image::check (about 0.1 s for 1 TiB of mapped disk), and four bytes of memory per host cluster in use while it
    /// runs. An image that needs more than 256 MiB is not counted. If false, refcounts and file lengths are trusted.
    /// Writes still never allocate clusters that hold metadata.
    bool verify_refcounts = true;
};

struct OpenOptions {
    /// Opens the image for writing, but not its backing files. Its Storage must be writable. The refcounts of a dirty
    /// image are rebuilt. An image that is marked as corrupt is refused.
    bool writable = false;
    WriteOptions write = {};  ///< used if `writable`
    /// The image's format. If unset, it is guessed from the contents. A file that is not qcow or qcow2 is then raw,
    /// with two exceptions: one with another format's signature (VMDK, VHD, LUKS, gzip, a web page, ...), and one named
    /// like "x.qcow2" that looks like nothing known. These give Errc::unsupported, with what they are and the remedy.
    /// The same rules hold for a backing file whose format is not recorded.
    std::optional<Format> format = {};
    /// If set, replaces the backing file that the header names. Null: no backing file, so unallocated bytes read as
    /// zeros. If the header names one, `warn` is called, and opening for writing gives Errc::invalid_argument.
    std::optional<std::shared_ptr<Storage>> backing = {};
    /// The format of the topmost image's backing file. If unset, the recorded format counts; if none is recorded, the
    /// format is guessed.
    std::optional<Format> backing_format = {};
    /// Opens backing files and external data files. No other file is opened.
    Gate gate = no_files();
    /// If false, only this image is opened, and for writing its data file, too. Its metadata can be read. Reading bytes
    /// that lie in other files fails.
    bool follow = true;
    /// Memory for cached metadata, in bytes, divided equally among the layers of the chain; each gets 32 KiB or more.
    /// The bits of enabled bitmaps that are written take up to a quarter of the topmost layer's share in addition, or
    /// up to 4 MiB if that is more.
    std::size_t cache_bytes = std::size_t{32} << 20;
    /// Returns the keys of encrypted layers. If unset, an encrypted layer can only be examined: reading its bytes and
    /// opening it for writing give Errc::encrypted. A wrong key gives Errc::encrypted, too, except for the legacy
    /// encryption ("aes"), which cannot tell: its data are then garbage.
    KeySource keys = {};
    double max_kdf_seconds = default_kdf_seconds;  ///< see default_kdf_seconds
    /// Receives warnings about what is odd but not wrong, one sentence each.
    std::function<void(const std::string&)> warn = {};
};

struct Feature {
    enum class Kind : std::uint8_t { incompatible, compatible, autoclear };
    Kind kind = Kind::incompatible;
    unsigned bit = 0;
    std::string name;    ///< from this library, else from the image's feature name table, else "bit N"
    bool known = false;  ///< this library knows the feature
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
    std::uint64_t granularity = 0;  ///< guest bytes per bit
    bool in_use = false;            ///< a writer has it open or did not close it: the bits in the file are not valid
    bool enabled = false;           ///< QEMU's "auto": writers record every write
};

/// A run of guest bytes whose bits in a bitmap are equal.
struct DirtyRun {
    GuestOffset start = {};
    std::uint64_t length = 0;  ///< bytes, never 0
    bool dirty = false;
};

struct EncryptionInfo {
    std::string method;  ///< "aes", "luks" or "luks2"
    std::string cipher;  ///< "aes-cbc-plain64", "aes-xts-plain64", ...
    std::string hash;    ///< LUKS: the hash of the key derivation, or its name (LUKS2: "argon2id"); else empty
    unsigned key_bits = 0;
    unsigned slots = 0;  ///< LUKS: number of key slots; else 0
    std::vector<unsigned> used_slots;
};

struct ReferenceInfo {
    std::string name;    ///< as recorded
    std::string path;    ///< resolved; empty if the name cannot be parsed
    std::string format;  ///< as recorded; empty: not recorded; "raw" for a data file
};

struct ExtensionInfo {
    std::uint32_t type = 0;
    std::uint32_t length = 0;
};

/// What the header and the tables say, without the mapping.
struct ImageInfo {
    std::string filename;
    Format format = Format::raw;
    std::uint64_t virtual_size = 0;
    std::uint64_t file_size = 0;
    std::uint64_t disk_size = 0;     ///< bytes that the image file occupies
    unsigned version = 0;            ///< 0 for raw
    std::uint64_t cluster_size = 0;  ///< bytes; 0 for raw
    std::string compression;         ///< "zlib" or "zstd"; empty for raw
    unsigned refcount_bits = 0;      ///< 0: the format has none
    bool dirty = false;
    bool corrupt = false;
    bool lazy_refcounts = false;
    bool extended_l2 = false;
    std::vector<Feature> features;  ///< all feature bits that are set
    std::optional<ReferenceInfo> backing;
    std::optional<ReferenceInfo> data_file;
    bool data_file_raw = false;
    std::optional<EncryptionInfo> encryption;
    std::vector<SnapshotInfo> snapshots;
    std::vector<BitmapInfo> bitmaps;
    bool bitmaps_stale = false;  ///< a writer that does not know bitmaps has changed the image
    std::vector<ExtensionInfo> unknown_extensions;
    // Set if this part is damaged. The other fields are valid.
    std::optional<Error> encryption_error;
    std::optional<Error> snapshots_error;
    std::optional<Error> bitmaps_error;
};

/// The size of a sector in bytes. A new or resized disk has a whole number of sectors. A disk that has not can be read
/// to its last byte.
inline constexpr std::uint64_t sector_bytes = 512;

/// Returns `bytes`, rounded up to whole sectors: the virtual size that a new or resized image gets.
constexpr std::uint64_t rounded_size(std::uint64_t bytes) {
    const std::uint64_t part = bytes % sector_bytes;
    // A size that no disk can have stays as it is, and is refused later.
    return part == 0 || bytes > std::uint64_t{1} << 63 ? bytes : bytes - part + sector_bytes;
}

/// An open image.
///
/// Thread safety: as for every Disk, unless a function says otherwise.
class QCOW_API Image : public Disk {
public:
    [[nodiscard]] virtual Format format() const = 0;

    /// Returns the names of this layer's files, as they were opened: the image file, and its data file if that is open.
    [[nodiscard]] virtual std::vector<std::string> files() const = 0;

    /// Returns the layer below; null if there is none, or if it was not opened (OpenOptions::follow).
    [[nodiscard]] virtual std::shared_ptr<Image> backing() const { return nullptr; }

    /// Returns what the header and the tables say. A damaged part is no error: see ImageInfo. Errors: Errc::io.
    [[nodiscard]] Result<ImageInfo> info() const;

    /// Returns a handle to the internal snapshots.
    [[nodiscard]] Snapshots snapshots() { return Snapshots(*this); }

    /// Visits the runs of a persistent bitmap in [begin, begin + length), in guest order, dirty and clean in turn. If
    /// the image is open for writing, they include every request that completed before the call. Requests in flight may
    /// be missing. Stops at the first error of the image or of `visit`.
    /// Errors: Errc::not_found: no such bitmap; Errc::corrupt: the bitmap is damaged, or a writer did not save it
    /// (in_use); Errc::unsupported: it has unknown extra data; Errc::invalid_argument: the range exceeds the disk.
    Result<void> each_dirty(std::string_view bitmap, GuestOffset begin, std::uint64_t length,
                            const std::function<Result<void>(const DirtyRun&)>& visit);

    /// Checks the metadata of this image, but not of its backing files. The image must not be written at the same time.
    /// Errors: Errc::unsupported for formats without metadata; Errc::limit_exceeded for CheckOptions::memory_bytes;
    /// Errc::cancelled; Errc::io.
    Result<CheckReport> check(const CheckOptions& options);

    /// Writes whole clusters, compressed. `at` is a multiple of block_size(). The end of the range is a multiple of it,
    /// too, or the end of the disk. A cluster that does not become smaller is stored uncompressed. `level`: see
    /// ConvertOptions.
    /// Errors: Errc::unsupported for a format without compression, for an image with an external data file, and for an
    /// encrypted one, since the format does not encrypt compressed clusters; Errc::invalid_argument for another range
    /// or level; those of Disk::write.
    Result<void> write_compressed(GuestOffset at, std::span<const std::byte> from,
                                  std::optional<int> level = std::nullopt);

    enum class Shrink : bool { refuse, allow };

    /// Changes the virtual size to rounded_size(size) bytes. New bytes read as zeros. A smaller size needs
    /// Shrink::allow, and loses the bytes past the new end; close() cuts unused clusters off the file. Bitmaps get the
    /// new size, with clean new bits. A bitmap that is damaged or no longer fits into memory becomes in_use. After an
    /// error, size() returns the size that the image has.
    /// Requests past the smaller of the two sizes must not be in flight.
    /// Errors: Errc::invalid_argument: the size is smaller, without Shrink::allow, or too large for the format;
    /// Errc::limit_exceeded: a bitmap would have more than 512 MiB of bits; Errc::unsupported: version 2 with
    /// snapshots; those of Disk::write.
    Result<void> resize(std::uint64_t size, Shrink shrink = Shrink::refuse);

    /// Records another backing file in the header, durably. The open image keeps the layers that it has: close it and
    /// open it again. See rebase() for what a new backing file needs. `name` is recorded as it is (see recorded_name);
    /// empty: the image has no backing file. A crash leaves the old name or the new one.
    /// Errors: Errc::invalid_argument: the name is longer than 1023 bytes, or the image has a raw data file;
    /// Errc::limit_exceeded: the header does not fit in a cluster; Errc::unsupported: the format has no backing files.
    Result<void> change_backing(const std::string& name, std::optional<Format> format);

    /// Changes the persistent bitmaps. The actions follow each other, and take effect together: after an error, none of
    /// them has. Durable when it returns. A crash leaves the old bitmaps or the new ones. Requests that change the disk
    /// are held meanwhile; those that returned before the call are in the bitmaps that a merge reads.
    /// Errors: Errc::unsupported: version 2, or a format without bitmaps; those of BitmapAction::Kind; Errc::no_space,
    /// io. Thread safety: as all functions; no source image may be waiting for this image.
    Result<void> change_bitmaps(std::span<const BitmapAction> actions);

    /// Gives up all that this image stores of its disk: every byte then comes from the backing file, and reads as zero
    /// where that has none. Snapshots stay. Bitmaps record no change, since the caller has seen to it that the backing
    /// file holds the same contents. close() cuts unused clusters off the file. An error or a crash leaves a part of
    /// the image emptied. Requests that change the disk must not be in flight.
    /// Errors: Errc::unsupported: the format has no backing files, or the image has a raw data file; those of
    /// Disk::write.
    Result<void> make_empty();

    /// Ends writing: flushes, saves the bitmaps, and gives back reserved space. Afterwards the image is read-only. No
    /// other request may be in flight. The destructor closes the image, too, but cannot report errors.
    Result<void> close();

protected:
    // The implementation of a format: see Disk.

    [[nodiscard]] virtual Result<ImageInfo> do_info() const = 0;
    friend class Snapshots;
    [[nodiscard]] virtual Result<std::vector<SnapshotInfo>> do_list_snapshots() const;
    virtual Result<std::shared_ptr<Disk>> do_open_snapshot(std::string_view id_or_name);
    virtual Result<SnapshotInfo> do_create_snapshot(const std::string& name);
    virtual Result<void> do_apply_snapshot(std::string_view id_or_name);
    virtual Result<void> do_remove_snapshot(std::string_view id_or_name);
    virtual Result<void> do_rename_snapshot(std::string_view id_or_name, const std::string& name);
    virtual Result<void> do_each_dirty(std::string_view bitmap, GuestOffset begin, std::uint64_t length,
                                       const std::function<Result<void>(const DirtyRun&)>& visit);
    virtual Result<CheckReport> do_check(const CheckOptions& options);
    virtual Result<void> do_write_compressed(GuestOffset at, std::span<const std::byte> from, std::optional<int> level);
    /// `size` is rounded, and differs from the disk's.
    virtual Result<void> do_resize(std::uint64_t size);
    virtual Result<void> do_change_backing(const std::string& name, std::optional<Format> format);
    virtual Result<void> do_change_bitmaps(std::span<const BitmapAction> actions);
    virtual Result<void> do_make_empty();
    virtual Result<void> do_close();
};

/// Opens an image, and the chain below it as far as `options` allow. Memory is bounded by the cache budget and the
/// length of the chain, whatever the image claims. Reading needs only the header and the mapping: refcounts, snapshots
/// and bitmaps may be damaged. Writing needs all of them.
///
/// Errors: Errc::corrupt; Errc::unsupported; Errc::refused_by_policy, or another error of the gate;
/// Errc::limit_exceeded: the chain has more than 4096 files, or more than the process may have open;
/// Errc::invalid_argument: see OpenOptions::backing; Errc::encrypted: a key is missing or wrong; Errc::io.
QCOW_API Result<std::shared_ptr<Image>> open_image(std::shared_ptr<Storage> storage, const OpenOptions& options = {});

}  // namespace qcow
