#pragma once
// Mounting: disks as files of this machine, by FUSE.

#include <functional>
#include <memory>
#include <string>

#include "qcow/disk.h"
#include "qcow/error.h"
#include "qcow/export.h"

namespace qcow {

struct MountOptions {
    /// If true, no file can be changed. The disk may then be open for reading only.
    bool read_only = false;
    /// If true, all users can reach the files, as far as the permissions allow. If false, only the user who mounts can,
    /// and not even root. Users other than root need "user_allow_other" in /etc/fuse.conf.
    bool allow_other = false;
    /// Threads that perform requests. 0: one per processor, and more if the disk is slow. At most 64.
    unsigned threads = 0;
    /// Receives the error behind a request that failed, because the program that made the request gets only an errno.
    /// Called for the first error of each kind. Thread safety: called from any thread, one call at a time.
    std::function<void(const Error&)> failed = {};
    /// Called to unmount, in place of Mount::unmount, if this process will not be allowed to: a sandbox forbids it. It
    /// has another process call Mount::unmount, and waits for that. Called once, unless somebody else has unmounted.
    std::function<void()> unmount = {};
};

/// A mounted disk. There are two forms:
///
/// - On a regular file: the file is the disk. What the file holds is hidden until the end.
/// - On an empty directory: `disk`; `partitions/N` for each partition that the disk had when it was mounted; and, if
///   the disk is an Image, `snapshots/NAME` for each internal snapshot, read-only. See snapshot_file_name().
///
/// The files have the size of their disks, and the owner, the group and the permissions of the mount point, without the
/// right to execute, and without the right to write if they are read-only. They behave like block devices:
///
/// - The size is fixed. truncate() to another size fails with EOPNOTSUPP. A write past the end fails with ENOSPC, and a
///   write across the end is cut off there.
/// - fsync() is Disk::flush. close() is not: data that were not flushed may be lost in a power failure.
/// - fallocate() makes zeros: FALLOC_FL_PUNCH_HOLE is Disk::write_zeroes with Zeroes::release, and
///   FALLOC_FL_ZERO_RANGE with Zeroes::keep. All other modes fail with EOPNOTSUPP, because a Disk cannot reserve space.
///   posix_fallocate() of glibc then reserves the space by writing.
/// - SEEK_DATA and SEEK_HOLE find holes: bytes that read as zeros and are not stored.
/// - Reads and writes go through the kernel's page cache, or past it with O_DIRECT. mmap() works. Exception: in a
///   directory that can be written, `disk` and `partitions` never use the page cache, so that each file shows at once
///   what was written through another one. MAP_SHARED fails there with ENODEV.
///
/// No other program may change the image while it is mounted.
///
/// Thread safety: stop() may be called from any thread. All other functions: one thread at a time.
class QCOW_API Mount {
public:
    /// Mounts `disk` on `target`. Programs that use the files wait until run() is called. The mount point may be the
    /// image file itself, since that is already open. Everything that run() needs is open then, but for unmounting.
    /// Errors: Errc::not_found: there is no such file or directory; Errc::invalid_argument: a directory that is not
    /// empty, or neither a file nor a directory; Errc::unsupported: this build has no FUSE, or this system has no
    /// /dev/fuse or no fusermount3, which users other than root need; Errc::access_denied: the system refuses;
    /// Errc::read_only: `disk` cannot be written, and MountOptions::read_only is false; those of list_partitions.
    static Result<std::unique_ptr<Mount>> make(std::shared_ptr<Disk> disk, const std::string& target,
                                               const MountOptions& options = {});

    Mount(const Mount&) = delete;
    Mount& operator=(const Mount&) = delete;
    /// Unmounts if run() has not.
    virtual ~Mount() = default;

    /// Performs requests until stop() is called or somebody unmounts (umount, fusermount3 -u). Then unmounts, completes
    /// the requests that it has received, and flushes the disk. Programs that still have a file open get ENOTCONN from
    /// then on. Errors: the first error of the connection to the kernel or of the flush.
    virtual Result<void> run() = 0;

    /// Makes run() return, also a later call of it. Async-signal-safe.
    virtual void stop() noexcept = 0;

    /// Unmounts what is mounted on the absolute path `target`, even if it is in use. Before that, the kernel sends what
    /// programs have written by mmap() and not synchronised. Does nothing if the system refuses.
    static void unmount(const std::string& target);

protected:
    Mount() = default;
};

/// Returns the name of a snapshot's file in a mounted directory: the snapshot's name, with "/", "%" and a leading "."
/// as "%2F", "%25" and "%2E". If the name is not printable text, all bytes but printable ASCII are written as "%XX".
/// Returns an empty string if the result is empty or longer than 255 bytes: the file is then called "%id=ID", as is the
/// second of two snapshots with the same name.
QCOW_API std::string snapshot_file_name(const std::string& snapshot);

}  // namespace qcow
