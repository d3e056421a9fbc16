#pragma once
// Serving disks to other programs over the NBD protocol (network block device).

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "qcow/image.h"

namespace qcow {

/// A run of bytes with the same flags in a context.
struct NbdStatus {
    std::uint64_t length = 0;  ///< bytes, at least 1
    std::uint32_t flags = 0;   ///< their meaning depends on the context
};

/// A metadata context: what clients can ask about ranges of an export, in addition to "base:allocation".
struct NbdContext {
    using Visit = std::function<bool(const NbdStatus&)>;
    std::string name;  ///< "NAMESPACE:LEAF", as clients write it
    /// Visits the runs of [at, at + length) in order, until `visit` returns false. The range lies within the disk. The
    /// function may end early, after at least one run, if the rest takes long: clients ask again.
    /// Thread safety: called from any number of threads at once.
    std::function<Result<void>(GuestOffset at, std::uint64_t length, const Visit& visit)> status;
};

/// Returns the context "qemu:dirty-bitmap:NAME" of a persistent bitmap. Flag 1 marks the bytes that were written since
/// the bitmap was made or cleared, those of this server's clients included. Errors: see Image::each_dirty.
QCOW_API Result<NbdContext> dirty_bitmap_context(std::shared_ptr<Image> image, const std::string& bitmap);

/// A disk that is served under a name.
struct NbdExport {
    std::string name;              ///< at most 4096 bytes of UTF-8; unique in a server; may be empty
    std::string description = {};  ///< for people, at most 4096 bytes; empty: none
    std::shared_ptr<Disk> disk = {};
    bool read_only = false;         ///< requests that change the disk are refused
    bool allocation_depth = false;  ///< offers "qemu:allocation-depth": which layer of the chain holds the bytes
    std::vector<NbdContext> contexts = {};
};

/// Bounds on what clients can make a server use.
struct NbdLimits {
    /// Clients at a time that have chosen an export. Others wait until one leaves. Clients that have not chosen one
    /// have 64 further sockets; if all are taken, the oldest of these clients is disconnected. A client whose machine
    /// vanishes from the network is disconnected after two minutes, or after 15 minutes if it was being sent a reply.
    unsigned connections = 16;
    /// Threads for the requests of one client, in addition to the one that reads them. 0: one request at a time.
    unsigned workers = 16;
    /// Bytes in flight between one client and the disk. Further requests wait in the client's socket. In addition, each
    /// thread has a buffer of one block, but not less than 256 KiB and not more than 2 MiB.
    std::uint64_t connection_bytes = std::uint64_t{4} << 20;
    /// Seconds until a client must have chosen an export, TLS included. At least 1.
    unsigned handshake_seconds = 30;
};

/// TLS (1.2 or 1.3). If set, clients must use TLS: others learn nothing and get nothing.
///
/// Set either `certificates` or `psk_file`. The files are read once. Only the server should be able to read them.
/// Memory: up to 300 KiB more per connection.
struct NbdTls {
    /// A directory with server-cert.pem and server-key.pem, which identify the server. To verify clients, also with
    /// ca-cert.pem and, optionally, ca-crl.pem.
    std::string certificates = {};
    /// Only with `certificates`. If true, clients need a certificate that ca-cert.pem has signed and ca-crl.pem does
    /// not revoke. If false, any client is accepted.
    bool verify_peer = false;
    /// A file with lines NAME:KEY, the key in hexadecimal. Clients need one of these keys.
    std::string psk_file = {};
};

struct NbdOptions {
    NbdLimits limits = {};
    std::optional<NbdTls> tls = {};  ///< unset: no TLS
    /// If false, run() returns when the last client has left.
    bool persistent = true;
};

/// Serves disks to any number of clients. A client that asks for the empty name gets the export with that name, else
/// the first export.
///
/// Thread safety: functions may be called from any thread, but listen_... not during run().
class QCOW_API NbdServer {
public:
    /// Makes a server that does not listen yet. Errors: Errc::invalid_argument: no exports, a name that is too long or
    /// occurs twice, or an invalid TLS file; Errc::unsupported: this build has no TLS; those of reading the TLS files.
    static Result<std::unique_ptr<NbdServer>> make(std::vector<NbdExport> exports, const NbdOptions& options = {});

    NbdServer(const NbdServer&) = delete;
    NbdServer& operator=(const NbdServer&) = delete;
    virtual ~NbdServer() = default;

    /// Makes a Unix socket at `path`, and listens on it. The server removes it at the end. A socket that a dead server
    /// left there is replaced. Errors: Errc::locked if anything else is at `path`; Errc::invalid_argument for a path of
    /// no or more than 107 bytes; those of the system.
    virtual Result<void> listen_unix(const std::string& path) = 0;

    /// Listens on every address of `host`. Port 0 stands for any free port. Returns the port.
    /// Errors: Errc::not_found for an unknown host; those of the system.
    virtual Result<std::uint16_t> listen_tcp(const std::string& host, std::uint16_t port) = 0;

    /// Takes over a listening socket, and closes it at the end. Errors: Errc::invalid_argument for other descriptors.
    virtual Result<void> listen_inherited(int fd) = 0;

    /// Accepts clients until stop() is called, or until the last one leaves if NbdOptions::persistent is false. Then it
    /// completes the requests that it has received, disconnects the clients, and flushes the disks of writable exports.
    /// A client that does not read its replies is disconnected after five seconds.
    /// Errors: the first error of accepting clients or of a flush.
    virtual Result<void> run() = 0;

    /// Makes run() return, also a later call of it. Async-signal-safe.
    virtual void stop() noexcept = 0;

protected:
    NbdServer() = default;
};

}  // namespace qcow
