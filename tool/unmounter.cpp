#include "unmounter.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <optional>

#include "command.h"
#include "qcow/mount.h"
#include "qcow/text.h"

namespace tool {
namespace {

/// The device of what is mounted there. Nobody has to answer for that: the file system may be dead, or not run yet.
std::optional<dev_t> device_of(const std::string& path) {
    struct statx status = {};
    if (statx(AT_FDCWD, path.c_str(), AT_STATX_DONT_SYNC, 0, &status) != 0) return std::nullopt;
    return makedev(status.stx_dev_major, status.stx_dev_minor);
}

/// What the process does.
[[noreturn]] void wait_and_unmount(int socket, const std::string& target) {
    const auto device = device_of(target);
    // A terminal and a service manager send signals to all processes. This one has to outlive the other.
    for (const int signal : {SIGINT, SIGTERM, SIGHUP}) std::signal(signal, SIG_IGN);
    // What is open keeps the image locked, and the mount alive.
    dup2(socket, 0);
    close_range(1, ~0U, 0);
    char byte = 0;
    while (read(0, &byte, 1) < 0 && errno == EINTR) continue;
    // Not what somebody has mounted there since.
    if (device_of(target) == device) qcow::Mount::unmount(target);
    send(0, &byte, 1, MSG_NOSIGNAL);
    _exit(0);
}

}  // namespace

Unmounter::~Unmounter() {
    if (socket_ >= 0) close(socket_);
}

qcow::Result<void> Unmounter::start(const std::string& target) {
    const auto failure = [&] {
        return std::unexpected(qcow::Error{
            qcow::Errc::io, target, fmt::format("cannot start a process that unmounts: {}", std::strerror(errno))});
    };
    std::array<int, 2> pair = {};
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair.data()) != 0) return failure();
    const pid_t child = fork();
    if (child == 0) {
        close(pair[0]);
        wait_and_unmount(pair[1], target);
    }
    close(pair[1]);
    if (child < 0) close(pair[0]);
    if (child < 0) return failure();
    socket_ = pair[0];
    return {};
}

void Unmounter::unmount(const std::string& target) const {
    if (socket_ < 0) return qcow::Mount::unmount(target);
    char byte = 0;
    // It may also die between the question and the answer.
    ssize_t answer = send(socket_, &byte, 1, MSG_NOSIGNAL);
    if (answer == 1) {
        do {
            answer = read(socket_, &byte, 1);
        } while (answer < 0 && errno == EINTR);
    }
    if (answer == 1) return;
    complain(
        fmt::format("{}: the process that unmounts is gone; use fusermount3 -u or umount", qcow::printable(target)));
}

}  // namespace tool
