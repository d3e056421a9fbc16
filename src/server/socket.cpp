#include "server/socket.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>

namespace qcow {
namespace {

constexpr int backlog = 128;

/// Room for some large pieces, so that the next is read from the disk while the peer takes the last.
constexpr int send_buffer = 1 << 20;

/// Without a sign of life from the peer's system for a minute it is asked for one, six times in another minute.
constexpr int silence_seconds = 60;
constexpr int probe_seconds = 10;
constexpr int probes = 6;

/// Without effect on a Unix socket, whose peer cannot vanish. Where data are under way the system's own limit holds,
/// about a quarter of an hour: a shorter one would also end those who are stopped for a while and take no replies.
void notice_who_vanishes(int fd) {
    const auto set = [fd](int level, int option, int value) { setsockopt(fd, level, option, &value, sizeof value); };
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
    set(IPPROTO_TCP, TCP_KEEPIDLE, silence_seconds);
    set(IPPROTO_TCP, TCP_KEEPINTVL, probe_seconds);
    set(IPPROTO_TCP, TCP_KEEPCNT, probes);
}

FileDescriptor make_socket(int family) { return FileDescriptor(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0)); }

Result<sockaddr_un> unix_address(const std::string& path) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    if (path.empty() || path.size() >= sizeof address.sun_path) {
        return fail(Errc::invalid_argument, path,
                    fmt::format("the path of a socket has 1 to {} bytes", sizeof address.sun_path - 1));
    }
    std::memcpy(address.sun_path, path.data(), path.size());
    return address;
}

/// A server that was killed leaves its socket behind: nobody answers there.
bool is_abandoned(const std::string& path, const sockaddr_un& address) {
    // Other kinds of files refuse connections, too.
    struct stat status = {};
    if (lstat(path.c_str(), &status) != 0 || !S_ISSOCK(status.st_mode)) return false;
    const auto probe = make_socket(AF_UNIX);
    return connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 &&
           errno == ECONNREFUSED;
}

std::uint16_t bound_port(int fd) {
    sockaddr_storage address = {};
    socklen_t length = sizeof address;
    if (getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) return 0;
    if (address.ss_family == AF_INET) return ntohs(reinterpret_cast<const sockaddr_in&>(address).sin_port);
    return ntohs(reinterpret_cast<const sockaddr_in6&>(address).sin6_port);
}

}  // namespace

Listener::~Listener() {
    if (!path_.empty()) unlink(path_.c_str());
}

Result<Listener> listen_unix(const std::string& path, Admits admits) {
    const auto address = TRY(unix_address(path));
    auto fd = make_socket(AF_UNIX);
    if (fd.get() < 0) return system_error("cannot make a socket", path, errno);
    const auto try_to_bind = [&] {
        return bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
    };
    bool bound = try_to_bind();
    int error = bound ? 0 : errno;
    if (error == EADDRINUSE && is_abandoned(path, address)) {
        unlink(path.c_str());
        bound = try_to_bind();
        error = errno;
    }
    if (!bound && error == EADDRINUSE)
        return fail(Errc::locked, path, "there is something already; choose another path, or stop the server there");
    if (!bound) return system_error("cannot make a socket", path, error);
    Listener listener(std::move(fd), path);
    // Before it listens, nobody can connect.
    if (admits == Admits::owner_only && chmod(path.c_str(), S_IRUSR | S_IWUSR) != 0)
        return system_error("cannot keep other users away", path, errno);
    if (listen(listener.fd(), backlog) != 0) return system_error("cannot listen", path, errno);
    return listener;
}

Result<Listener> listen_inherited(int fd) {
    int listens = 0;
    socklen_t length = sizeof listens;
    const auto name = fmt::format("file descriptor {}", fd);
    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &length) != 0 || listens == 0)
        return fail(Errc::invalid_argument, name, "is not a socket that listens");
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    return Listener(FileDescriptor(fd), {});
}

Result<TcpListeners> listen_tcp(const std::string& host, std::uint16_t port) {
    addrinfo hints = {};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE;
    addrinfo* found = nullptr;
    if (const int error = getaddrinfo(host.c_str(), "0", &hints, &found); error != 0)
        return fail(Errc::not_found, host, fmt::format("no address of this host: {}", gai_strerror(error)));
    const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> addresses(found, freeaddrinfo);

    TcpListeners result{{}, port};
    int error = EADDRNOTAVAIL;
    for (const auto* address = found; address != nullptr; address = address->ai_next) {
        auto fd = make_socket(address->ai_family);
        if (fd.get() < 0) continue;  // a family that this system does not have
        const int yes = 1;
        setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        if (address->ai_family == AF_INET6) {
            setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &yes, sizeof yes);
            reinterpret_cast<sockaddr_in6*>(address->ai_addr)->sin6_port = htons(result.port);
        } else {
            reinterpret_cast<sockaddr_in*>(address->ai_addr)->sin_port = htons(result.port);
        }
        if (bind(fd.get(), address->ai_addr, address->ai_addrlen) != 0 || listen(fd.get(), backlog) != 0) {
            error = errno;
            // ::1 is in the hosts file of machines that do not have it.
            if (error == EADDRNOTAVAIL) continue;
            return system_error(fmt::format("cannot listen on port {}", result.port), host, error);
        }
        result.port = bound_port(fd.get());
        result.listeners.emplace_back(std::move(fd), std::string());
    }
    if (result.listeners.empty()) return system_error(fmt::format("cannot listen on port {}", port), host, error);
    return result;
}

SocketStream::SocketStream(FileDescriptor fd, std::chrono::seconds patience)
    : fd_(std::move(fd)), deadline_(std::chrono::steady_clock::now() + patience) {
    const int yes = 1;
    setsockopt(fd_.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);  // without effect on a Unix socket
    setsockopt(fd_.get(), SOL_SOCKET, SO_SNDBUF, &send_buffer, sizeof send_buffer);
    notice_who_vanishes(fd_.get());
}

void SocketStream::wait_forever() {
    deadline_.reset();
    set_timeout(std::chrono::microseconds(0));
}

/// For the next call to the system. Returns false if it is too late for another one.
bool SocketStream::limit_waiting() {
    if (!deadline_) return true;
    const auto left =
        std::chrono::duration_cast<std::chrono::microseconds>(*deadline_ - std::chrono::steady_clock::now());
    if (left.count() <= 0) return false;
    set_timeout(left);
    return true;
}

void SocketStream::set_timeout(std::chrono::microseconds timeout) {
    const timeval value = {timeout.count() / 1'000'000, timeout.count() % 1'000'000};
    setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &value, sizeof value);
    setsockopt(fd_.get(), SOL_SOCKET, SO_SNDTIMEO, &value, sizeof value);
}

std::size_t SocketStream::receive(std::span<std::byte> to) {
    while (limit_waiting()) {
        const ssize_t n = recv(fd_.get(), to.data(), to.size(), 0);
        if (n >= 0) return static_cast<std::size_t>(n);
        if (errno != EINTR) return 0;
    }
    return 0;
}

bool SocketStream::send(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
        if (!limit_waiting()) return false;
        const ssize_t n = ::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return false;
        bytes = bytes.subspan(static_cast<std::size_t>(n));
    }
    return true;
}

void SocketStream::shutdown() { ::shutdown(fd_.get(), SHUT_RDWR); }

void SocketStream::stop_receiving() { ::shutdown(fd_.get(), SHUT_RD); }

}  // namespace qcow
