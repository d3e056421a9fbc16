#pragma once
// Storage: where the bytes of an image file live.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "qcow/buffers.h"
#include "qcow/error.h"
#include "qcow/export.h"
#include "qcow/offset.h"

namespace qcow {

/// A flat, growable space of bytes. All functions may be called from any number of threads at once; what
/// overlapping concurrent writes leave behind is unspecified, as it is with pwrite(2).
class QCOW_API Storage {
public:
    Storage() = default;
    Storage(const Storage&) = delete;
    Storage& operator=(const Storage&) = delete;
    virtual ~Storage() = default;

    /// How messages name it: for a file the path that it was opened by.
    [[nodiscard]] virtual const std::string& name() const = 0;

    /// Equal for two Storages exactly when they are the same object underneath (for files: device and inode).
    [[nodiscard]] virtual std::string identity() const = 0;

    /// The length in bytes, now.
    [[nodiscard]] virtual Result<std::uint64_t> size() const = 0;

    /// Bytes that it occupies where it lives; less than size() for a sparse file.
    [[nodiscard]] virtual Result<std::uint64_t> allocated() const = 0;

    /// Fills `to` from `at` on. Past the end there are zeros; returns how many bytes came from before the end.
    virtual Result<std::size_t> read(HostOffset at, Buffers to) const = 0;

    /// Writes all of `from`; grows when it ends past the end. Errc::read_only, no_space or io.
    virtual Result<void> write(HostOffset at, ConstBuffers from) = 0;

    /// Makes `length` bytes read as zeros, as holes where that is possible. Does not grow.
    virtual Result<void> write_zeroes(HostOffset at, std::uint64_t length) = 0;

    /// Reserves space for `length` bytes, so that writing them needs no more, and grows as needed. Their contents stay,
    /// and are zeros where there were none. Where space cannot be reserved it only grows. Errc::no_space.
    virtual Result<void> allocate(HostOffset at, std::uint64_t length);

    /// Sets the length; new bytes read as zeros.
    virtual Result<void> resize(std::uint64_t size) = 0;

    /// Makes everything that was written before, by anybody, survive power loss. Where that fails it fails for all who
    /// flush meanwhile: none may be told that what another one's error is about was written. Errc::io, no_space.
    virtual Result<void> flush() = 0;

    struct Run {
        bool data = true;  ///< false: a hole, reads as zeros
        std::uint64_t length = 0;
    };
    /// The longest run from `at` on that is known to be all data or all hole, at most `limit` bytes (`limit` > 0).
    /// Where holes cannot be told, or past the end, the whole is reported as data or hole respectively.
    [[nodiscard]] virtual Result<Run> run(HostOffset at, std::uint64_t limit) const = 0;

    /// Lets the kernel copy or share `length` bytes of `source` into this Storage without passing them through
    /// the process. Returns the bytes done, less than `length` where the kernel stopped: go on with read and write.
    /// 0 where these two cannot do it at all.
    virtual Result<std::uint64_t> copy_from(const Storage& source, HostOffset from, HostOffset to,
                                            std::uint64_t length);
};

/// How a file is opened.
struct FileOptions {
    bool writable = false;
    /// Open without taking locks, although another process may be writing. Reads may then see half a change. Only for
    /// reading: Errc::invalid_argument together with `writable`, as two writers destroy an image.
    bool force_share = false;
    /// Past the system's cache (O_DIRECT): for disks whose contents would not be used again from there. Requests may
    /// nevertheless begin and end anywhere, and memory lie anywhere: what is not aligned as the device wants it (in
    /// general to 512 or 4096 bytes) takes a copy, and a write of part of a block reads the block first. Writes still
    /// need a flush to survive power loss. Errc::unsupported where the file system has no direct I/O.
    bool direct = false;
};

/// Opens a regular file or block device. A block device that is to be written is opened exclusively: Errc::locked if it
/// is mounted, or used by another program in that way. Takes open-file-description locks in the layout that QEMU uses
/// (permission p at byte 100 + p, "nobody else may" p at byte 200 + p), so that both respect each other: a reader
/// excludes writers, a writer excludes everybody but readers that force it. Errc::locked names the remedy.
QCOW_API Result<std::shared_ptr<Storage>> open_file(const std::string& path, const FileOptions& options = {});

class FilesInUse;

/// A file that appears under its name only when it is complete. Until then the name stays as it was: absent, or with
/// the old contents; and whatever happens to the process, nothing is left over (where the file system has no unnamed
/// files, a file whose name ends in ".part" is, unless abandon_new_files is called). What takes the place of a file has
/// its owner, group, mode, ACL and extended attributes, as far as the process may set them.
///
/// Some files cannot be replaced: block devices, mount points, files in directories that may not be changed. These are
/// written in place. They keep their contents until the first change, which empties a file. Not thread-safe itself.
class QCOW_API NewFile {
public:
    enum class Existing : std::uint8_t {
        replaced,       ///< a file that has the name gives way
        only_if_empty,  ///< where it holds something, begin and publish fail; a block device may hold anything
    };

    /// Begins the file that is to become `path`, and adds it to `in_use` in its `role`. Changes nothing yet.
    /// Errc::invalid_argument if the file is in use by the same job, or not empty and to be so; locked if another
    /// process uses it; access_denied.
    static Result<NewFile> begin(const std::string& path, FilesInUse& in_use, const std::string& role,
                                 Existing existing = Existing::replaced);

    NewFile(NewFile&&) noexcept;
    NewFile& operator=(NewFile&&) = delete;
    ~NewFile();

    /// Where the contents go.
    [[nodiscard]] const std::shared_ptr<Storage>& storage() const;

    /// Whether everything reads as zeros at first: not so for a block device.
    [[nodiscard]] bool starts_as_zeros() const;

    /// Why a regular file is written in place, as a sentence without subject ("is a mount point"); empty if it is not.
    [[nodiscard]] const std::string& obstacle() const;

    /// Whether it is written in place and has lost its old contents, but was not published.
    [[nodiscard]] bool is_incomplete() const;

    enum class Contents : bool { as_they_are, durable };

    /// Gives it its name, in place of a file that had it. Where the contents are made durable, they are so before the
    /// name leads to them, and the name is when this returns: a power loss leaves the old file or the whole new one
    /// before, and the new one after.
    Result<void> publish(Contents contents = Contents::durable);

private:
    struct State;
    explicit NewFile(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

/// What a job that did not complete has left in a file.
enum class Incomplete : std::uint8_t {
    written_in_place,  ///< a part of the new contents: see NewFile::is_incomplete
    part_of_source,    ///< the image was there already, and holds a part of what was converted into it
};

/// For handlers of signals that end the process: removes the temporary names of NewFiles that are not published, and
/// calls `incomplete` with the path of each file that is left incomplete. Async-signal-safe, if `incomplete` is.
QCOW_API void abandon_new_files(void (*incomplete)(const char* path, Incomplete what)) noexcept;

/// Bytes in memory, for tests and for embedding; growable and writable.
QCOW_API std::shared_ptr<Storage> memory_storage(std::vector<std::byte> bytes = {}, std::string name = "memory");

}  // namespace qcow
