#pragma once
// Serving disks to other programs over the network block device protocol (NBD).

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "qcow/image.h"

namespace qcow {

/// A run of bytes with the same flags in a context that a client can ask about.
struct NbdStatus {
    std::uint64_t length = 0;  ///< bytes, at least one
    std::uint32_t flags = 0;   ///< what they mean is the context's own
};

/// Something that a client can ask about ranges of an export, beside what is allocated.
struct NbdContext {
    using Visit = std::function<bool(const NbdStatus&)>;
    std::string name;  ///< "NAMESPACE:LEAF", as clients write it
    /// Visits runs that together are [at, at + length), which lies within the disk, in their order, until `visit` says
    /// false. It may end earlier, after at least one run, where the rest takes long: clients ask again. Called from any
    /// number of threads at once.
    std::function<Result<void>(GuestOffset at, std::uint64_t length, const Visit& visit)> status;
};

/// The context "qemu:dirty-bitmap:NAME" of a persistent bitmap: flag 1 is on what was written since it was made or
/// cleared, with what this server's clients write. Errors: see Image::each_dirty.
QCOW_API Result<NbdContext> dirty_bitmap_context(std::shared_ptr<Image> image, const std::string& bitmap);

/// A disk under a name.
struct NbdExport {
    std::string name;              ///< at most 4096 bytes of UTF-8; no two exports of a server have the same
    std::string description = {};  ///< a text for people, at most 4096 bytes; empty: none
    std::shared_ptr<Disk> disk = {};
    bool read_only = false;         ///< nothing that changes the disk is let through
    bool allocation_depth = false;  ///< offers "qemu:allocation-depth": which layer of the chain decides
    std::vector<NbdContext> contexts = {};
};

/// What clients can make a server use, whatever they send.
struct NbdLimits {
    /// Clients at a time that have chosen an export; others wait until one leaves. There are at most 64 sockets more,
    /// of those who have not; when all of these are taken, the one that has needed longest makes way. A client whose
    /// machine vanishes from the network leaves after two minutes, or a quarter of an hour if it was being answered.
    unsigned connections = 16;
    /// Threads that one client can keep busy beside the one that reads from it. 0: requests are done one by one.
    unsigned workers = 16;
    /// Bytes of data on their way between one client and the disk; further requests wait in the client's socket. A
    /// thread has a buffer of 256 KiB or one block (the larger) of its own.
    std::uint64_t connection_bytes = std::uint64_t{4} << 20;
    /// Seconds (at least 1) that a client may take until it has chosen an export, TLS included.
    unsigned handshake_seconds = 30;
};

/// Encryption, and who is who. With it clients that do not ask for TLS (1.2 or 1.3) learn nothing and get nothing.
///
/// Either a directory of certificates or a file of keys. Both are read once; nobody but the server should be able to
/// read them. A connection takes up to 300 KiB more with it.
struct NbdTls {
    /// Holds server-cert.pem and server-key.pem, which prove to clients that this is the right server. To verify
    /// clients, also ca-cert.pem and, if there is one, ca-crl.pem.
    std::string certificates = {};
    /// Clients must have a certificate that ca-cert.pem signed, and ca-crl.pem does not revoke. False: anyone is let
    /// in.
    bool verify_peer = false;
    /// Lines of NAME:KEY, the key in hexadecimal; both sides have it, and prove it to each other.
    std::string psk_file = {};
};

struct NbdOptions {
    NbdLimits limits = {};
    std::optional<NbdTls> tls = {};  ///< nothing: no TLS
    /// False: run() returns when the last client has left.
    bool persistent = true;
};

/// Serves disks to any number of clients. Functions may be called from any thread, but listen_... not while it runs.
///
/// A client that asks for the export with the empty name gets the one that has it, else the first.
class QCOW_API NbdServer {
public:
    /// Errc::invalid_argument: no exports, names that are too long or occur twice, files of TLS that are not what they
    /// must be; others where those cannot be read; Errc::unsupported: built without TLS.
    static Result<std::unique_ptr<NbdServer>> make(std::vector<NbdExport> exports, const NbdOptions& options = {});

    NbdServer(const NbdServer&) = delete;
    NbdServer& operator=(const NbdServer&) = delete;
    virtual ~NbdServer() = default;

    /// Listens on a Unix socket that is made at `path` and removed with the server. A socket that a dead server left
    /// there is replaced; Errc::locked where somebody listens on it.
    virtual Result<void> listen_unix(const std::string& path) = 0;

    /// Listens on every address that `host` has; port 0 takes a free one. Returns the port.
    virtual Result<std::uint16_t> listen_tcp(const std::string& host, std::uint16_t port) = 0;

    /// Listens on a socket that listens already; it is closed with the server. Errc::invalid_argument.
    virtual Result<void> listen_inherited(int fd) = 0;

    /// Accepts clients until stop() is called, or the last one leaves where the options say so. Then requests that have
    /// been received are completed, the clients disconnected and all disks flushed, whose first error is returned. A
    /// client that does not take its replies is given five seconds.
    virtual Result<void> run() = 0;

    /// Ends run(), also one that has not begun. Safe in signal handlers.
    virtual void stop() noexcept = 0;

protected:
    NbdServer() = default;
};

}  // namespace qcow
