#pragma once
// Serving a disk to a virtual machine by shared memory: the back end of a virtio block device (virtio 1.2, section 5.2)
// over the vhost-user protocol. QEMU, Cloud Hypervisor, crosvm and others are front ends.

#include <functional>
#include <memory>
#include <string>

#include "qcow/disk.h"
#include "qcow/export.h"

namespace qcow {

struct VhostUserOptions {
    bool read_only = false;  ///< the guest sees a read-only disk; requests that change it fail
    /// Request queues that the device offers, 1 to 256. 0: one for each processor of this machine, at most 16.
    unsigned queues = 0;
    /// Descriptors of a queue of the front end, a power of two from 4 to 1024. It bounds the buffers of one request, to
    /// two less. Larger queues are accepted; smaller ones only hold the smaller requests.
    unsigned queue_size = 128;
    unsigned block_size = 512;  ///< the guest's logical block in bytes: 512 or 4096
    std::string serial = {};    ///< what the guest reads as the serial number: at most 20 bytes
    /// Threads for the slow requests of each queue, in addition to the one that takes them. 0: one request at a time.
    unsigned workers = 16;
    /// How long a queue that has become empty is looked at before its thread sleeps, in microseconds. It costs a
    /// processor, and saves the guest and the server system calls. A queue to which the last request came much later is
    /// not looked at: its thread sleeps at once.
    unsigned poll_microseconds = 0;
    bool persistent = true;  ///< if false, run() returns when a front end has left
    /// Is told, in a line, why a front end was disconnected or a queue stopped, and once for each kind of error that
    /// the disk has; not more than once a second for long. Is called from any thread. It must not throw. May be empty.
    std::function<void(const std::string&)> complain = {};
};

/// Serves one disk to one front end at a time.
///
/// Each queue has a thread. Data moves between the disk and the guest's memory without a copy where the format stores
/// it as it is. Nothing in the guest's memory is trusted: a request that is malformed, or whose memory is not the
/// guest's, fails, and a queue that is malformed stops.
///
/// The server offers a record of the requests in flight (INFLIGHT_SHMFD), which front ends keep. When a server was
/// killed and another one takes its place, it performs these requests again, and the guest only sees a delay. What was
/// complete survives in the same memory: see Disk::survive_in.
///
/// While it runs, the process has a handler for SIGBUS: a front end can truncate memory that it shares. Faults
/// elsewhere go to the handler that was there before.
///
/// Thread safety: functions may be called from any thread, but listen_... not during run().
class QCOW_API VhostUserServer {
public:
    /// Makes a server that does not listen yet. Errors: Errc::invalid_argument: an option out of its range, or a disk
    /// of less than a sector.
    static Result<std::unique_ptr<VhostUserServer>> make(std::shared_ptr<Disk> disk,
                                                         const VhostUserOptions& options = {});

    VhostUserServer(const VhostUserServer&) = delete;
    VhostUserServer& operator=(const VhostUserServer&) = delete;
    virtual ~VhostUserServer() = default;

    /// Makes a Unix socket at `path`, and listens on it. The server removes it at the end. Whoever can connect can use
    /// the disk. Errors: see NbdServer::listen_unix.
    virtual Result<void> listen_unix(const std::string& path) = 0;

    /// Takes over a listening socket, and closes it at the end. Errors: Errc::invalid_argument for other descriptors.
    virtual Result<void> listen_inherited(int fd) = 0;

    /// Serves one front end after the other until stop() is called, or until the first has left if
    /// VhostUserOptions::persistent is false. Then it completes the requests that it has taken, and flushes the disk if
    /// it is writable. Errors: the first error of accepting front ends or of the flush.
    virtual Result<void> run() = 0;

    /// Makes run() return, also a later call of it. Async-signal-safe.
    virtual void stop() noexcept = 0;

    /// Whether a front end has started a queue. If a killed server left one, nobody else may change the disk before
    /// that: see Disk::survive_in.
    [[nodiscard]] virtual bool has_served() const noexcept = 0;

    /// Tells the front end that the size of the disk has changed, if it has. Front ends then tell the guest.
    virtual void announce_size() noexcept = 0;

protected:
    VhostUserServer() = default;
};

}  // namespace qcow
