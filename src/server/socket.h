#pragma once
// Sockets: those that listen, and the Stream of one that is connected.

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "server/stream.h"
#include "storage/file.h"

namespace qcow {

/// A socket that listens. The file of one that has a path is removed with it.
class Listener {
public:
    Listener(FileDescriptor fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}
    Listener(Listener&& other) noexcept : fd_(std::move(other.fd_)), path_(std::exchange(other.path_, {})) {}
    Listener& operator=(Listener&&) = delete;
    ~Listener();

    [[nodiscard]] int fd() const { return fd_.get(); }

private:
    FileDescriptor fd_;
    std::string path_;  // empty: none
};

/// Who may connect to a Unix socket.
enum class Admits : std::uint8_t {
    as_umask_says,
    owner_only,  ///< from the first moment on
};

/// See NbdServer, which has the same.
Result<Listener> listen_unix(const std::string& path, Admits admits = Admits::as_umask_says);
Result<Listener> listen_inherited(int fd);

struct TcpListeners {
    std::vector<Listener> listeners;  ///< one an address, on one port
    std::uint16_t port = 0;
};
Result<TcpListeners> listen_tcp(const std::string& host, std::uint16_t port);

/// A connected socket. When wait_forever has not been called within `patience`, the peer has gone; one whose machine
/// has vanished from the network is gone after two minutes, or a quarter of an hour if it was being answered.
class SocketStream : public Stream {
public:
    SocketStream(FileDescriptor fd, std::chrono::seconds patience);

    std::size_t receive(std::span<std::byte> to) override;
    bool send(std::span<const std::byte> bytes) override;
    void wait_forever() override;
    void shutdown() override;

    /// Nothing more is received; what has arrived still is, and sending goes on.
    void stop_receiving();

private:
    bool limit_waiting();
    void set_timeout(std::chrono::microseconds timeout);

    FileDescriptor fd_;
    std::optional<std::chrono::steady_clock::time_point> deadline_;
};

}  // namespace qcow
