#pragma once
// Disk: what a guest sees. Whole-disk jobs and servers are written against this and nothing below it.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>

#include "qcow/buffers.h"
#include "qcow/error.h"
#include "qcow/export.h"
#include "qcow/offset.h"

namespace qcow {

class Storage;

/// A run of guest bytes that are alike.
struct Extent {
    enum class Kind : std::uint8_t {
        data,         ///< stored bytes
        zero,         ///< reads as zeros, because a layer says so
        unallocated,  ///< reads as zeros, because no layer of the chain says anything
    };

    GuestOffset start = {};
    std::uint64_t length = 0;  ///< bytes, never 0
    Kind kind = Kind::unallocated;
    bool compressed = false;
    unsigned depth = 0;  ///< the layer that decides: 0 is the disk itself, 1 its backing file, ...

    /// Where the first byte lies in `storage`, and the others behind it; for data that is stored as it is, and for
    /// zeros that keep a preallocated place. None for compressed or encrypted data.
    std::optional<HostOffset> host = {};
    const Storage* storage = nullptr;  ///< which file `host` is in; lives as long as the disk
};

/// Memory that outlives the process, such as a file in memory that another process has mapped, too. It begins at a
/// multiple of eight. `owner` keeps it mapped.
struct SurvivingMemory {
    std::span<std::byte> bytes;
    std::shared_ptr<void> owner;
};

/// A fixed number of bytes.
///
/// The public functions verify the request, call the virtual ones below, and turn memory that runs out into
/// Errc::no_memory: no exception leaves them.
///
/// Thread safety: all functions may be called from any number of threads at once.
class QCOW_API Disk {
public:
    Disk() = default;
    Disk(const Disk&) = delete;
    Disk& operator=(const Disk&) = delete;
    virtual ~Disk() = default;

    /// The virtual size in bytes.
    [[nodiscard]] virtual std::uint64_t size() const = 0;

    /// A power of two: reads and writes of whole, aligned blocks of this many bytes do no work twice. The cluster size,
    /// for formats that have one.
    [[nodiscard]] virtual std::uint64_t block_size() const = 0;

    /// Fills `to` with the guest's bytes from `at` on. Errors: Errc::invalid_argument where the range does not lie
    /// within size(). On any error the contents of `to` are unspecified; other ranges stay readable. A read of no bytes
    /// fails where a layer of the chain is out of reach, as one that is encrypted: reads of bytes fail where they need
    /// that layer, and extent() tells its zeros and holes.
    Result<void> read(GuestOffset at, Buffers to);

    /// Returns the run of alike bytes that begins at `at` (< size()), at most `limit` bytes (> 0). It may end earlier
    /// than the bytes cease to be alike: extents that come in pieces are merged by each_extent.
    Result<Extent> extent(GuestOffset at, std::uint64_t limit);

    // The verbs that change the disk. Errors: Errc::read_only where it is not open for writing, invalid_argument where
    // the range does not lie within size(). What requests that overlap and are in flight at once leave in the sectors
    // that they share is one of the values written.

    /// Writes all of `from` at `at`. On an error each sector of the range holds what it held before or what was to be
    /// written.
    Result<void> write(GuestOffset at, ConstBuffers from);

    /// What becomes of the storage of bytes that are made zeros.
    enum class Zeroes : std::uint8_t {
        release,  ///< given up where that is possible
        keep,     ///< kept where there is some, so that writing there again needs no more space
    };

    /// Makes the range read as zeros, whatever lies below: qcow2 images of version 3 record them where nothing was
    /// stored, too, which takes a table of one cluster for so many bytes as one maps (512 MiB with clusters of 64 KiB).
    Result<void> write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes = Zeroes::release);

    /// Says that the contents of the range are no longer needed. Whole blocks (see block_size()) give up their storage
    /// and read as zeros, other bytes stay as they are; all of them stay where the format or the options exclude it.
    Result<void> discard(GuestOffset at, std::uint64_t length);

    /// Lets the kernel copy or share `length` bytes of `source` to `at` without passing them through the process.
    /// Returns the bytes done, from the front; 0 where that is impossible. See Storage::copy_from.
    Result<std::uint64_t> copy_from(GuestOffset at, const Storage& source, HostOffset from, std::uint64_t length);

    /// When it returns, every write that completed before it began survives power loss.
    Result<void> flush();

    /// Keeps in `memory`, from now on, what is complete and only this process has: so a kill of the process loses
    /// nothing that is complete. Who opens the disk next calls this with the same memory before anything else, and the
    /// disk is as it was. Other changes are not allowed in between. Without this, a kill loses what was not flushed,
    /// as a power loss does. (A power loss still does.)
    ///
    /// The memory has at least 64 KiB; with less than some MiB, writes are slower. Its contents are not trusted: they
    /// can change what this disk holds, and nothing else. Called again, it moves to other memory. A disk that keeps
    /// nothing to itself does nothing.
    ///
    /// Errors: Errc::invalid_argument: the memory is too short, or the disk was changed since the process was killed,
    /// so that what the memory has does not apply; io, corrupt, no_space.
    Result<void> survive_in(SurvivingMemory memory);

protected:
    // What a disk does. Ranges lie within it, and limits do not reach past its end. Memory may run out
    // (std::bad_alloc).

    virtual Result<void> do_read(GuestOffset at, Buffers to) = 0;
    virtual Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) = 0;

    /// Errors: Errc::read_only, the default. The following are called only after it succeeded.
    [[nodiscard]] virtual Result<void> verify_writable() const;
    virtual Result<void> do_write(GuestOffset at, ConstBuffers from);
    virtual Result<void> do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes);
    virtual Result<void> do_discard(GuestOffset at, std::uint64_t length);
    virtual Result<std::uint64_t> do_copy_from(GuestOffset at, const Storage& source, HostOffset from,
                                               std::uint64_t length);

    virtual Result<void> do_flush();
    /// The default keeps nothing.
    virtual Result<void> do_survive_in(SurvivingMemory memory);

private:
    template <class Work>
    auto change(GuestOffset at, std::uint64_t length, Work&& work) -> decltype(work());
};

/// Visits the extents of [begin, begin + length) in guest order, merged as far as they are alike: same kind, layer and
/// file, and stored one behind the other. Stops at the first error, of the disk or of `visit`.
QCOW_API Result<void> each_extent(Disk& disk, GuestOffset begin, std::uint64_t length,
                                  const std::function<Result<void>(const Extent&)>& visit);

}  // namespace qcow
