#include "server/fuse/mounting.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <spawn.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string_view>
#include <utility>
#include <vector>

#include "server/fuse/operations.h"

namespace qcow {
namespace fuse {
namespace {

/// Returns the path of the program by which users other than root mount and unmount; empty: there is none.
std::string find_fusermount() {
    const char* const path = std::getenv("PATH");
    for (std::string_view rest = path == nullptr ? "" : path, directories = "/usr/bin:/bin:/usr/local/bin";
         !rest.empty() || !directories.empty();) {
        if (rest.empty()) std::swap(rest, directories);
        const auto directory = rest.substr(0, rest.find(':'));
        rest.remove_prefix(std::min(directory.size() + 1, rest.size()));
        auto program = fmt::format("{}/fusermount3", directory);
        if (access(program.c_str(), X_OK) == 0) return program;
    }
    return {};
}

std::vector<char*> pointers(const std::vector<std::string>& texts) {
    std::vector<char*> result;
    result.reserve(texts.size() + 1);
    for (const auto& text : texts) result.push_back(const_cast<char*>(text.c_str()));
    result.push_back(nullptr);
    return result;
}

/// Runs fusermount3, and waits for its end. `connection`: where it sends the descriptor of what it has mounted; -1:
/// nowhere. Returns whether it succeeded.
bool run_fusermount(const std::vector<std::string>& arguments, int connection) {
    std::vector<std::string> variables = {fmt::format("_FUSE_COMMFD={}", connection)};
    for (char** variable = environ; *variable != nullptr; ++variable) variables.emplace_back(*variable);
    pid_t child = -1;
    if (posix_spawn(&child, find_fusermount().c_str(), nullptr, nullptr, pointers(arguments).data(),
                    pointers(variables).data()) != 0)
        return false;
    int status = 0;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) return false;
    return status == 0;
}

/// Receives a descriptor. -1: there is none.
FileDescriptor receive_descriptor(int socket) {
    char byte = 0;
    iovec piece = {&byte, 1};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
    msghdr message = {};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    int fd = -1;
    if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) == 1) {
        const auto* const part = CMSG_FIRSTHDR(&message);
        if (part != nullptr && part->cmsg_type == SCM_RIGHTS) std::memcpy(&fd, CMSG_DATA(part), sizeof fd);
    }
    return FileDescriptor(fd);
}

/// Has fusermount3 mount, which tells users on standard error why it refuses.
Result<FileDescriptor> mount_by_program(const std::string& target, const std::string& settings) {
    std::array<int, 2> pair = {};
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair.data()) != 0)
        return system_error("cannot be mounted on", target, errno);
    const FileDescriptor ours(pair[0]);
    const FileDescriptor theirs(pair[1]);
    fcntl(ours.get(), F_SETFD, FD_CLOEXEC);
    const bool mounted = run_fusermount({"fusermount3", "-o", settings, "--", target}, theirs.get());
    auto connection = mounted ? receive_descriptor(ours.get()) : FileDescriptor(-1);
    if (connection.get() < 0) return fail(Errc::access_denied, target, "cannot be mounted on: fusermount3 refuses it");
    return connection;
}

}  // namespace

Result<struct stat> verify_mount_point(const std::string& target) {
    struct stat status = {};
    if (stat(target.c_str(), &status) != 0) {
        if (errno == ENOENT) {
            return fail(Errc::not_found, target,
                        "there is nothing to mount on; make an empty file (touch) or an empty directory (mkdir)");
        }
        if (errno == ENOTCONN) {
            return fail(Errc::access_denied, target,
                        "an earlier mount is left there, and its process is gone; use fusermount3 -u or umount");
        }
        return system_error("cannot be mounted on", target, errno);
    }
    if (S_ISREG(status.st_mode)) return status;
    if (!S_ISDIR(status.st_mode))
        return fail(Errc::invalid_argument, target, "it is neither a regular file nor a directory");
    std::error_code error;
    const bool empty = std::filesystem::is_empty(target, error);
    if (error) return system_error("cannot be read", target, error.value());
    if (!empty) return fail(Errc::invalid_argument, target, "the directory is not empty; name an empty one, or a file");
    return status;
}

Result<void> verify_system() {
    if (access(device, F_OK) != 0) {
        return fail(Errc::unsupported, device,
                    "this system has no FUSE; load the kernel module (modprobe fuse), or give the container the device "
                    "(docker: --device /dev/fuse --cap-add SYS_ADMIN)");
    }
    if (access(device, R_OK | W_OK) != 0) {
        return fail(Errc::access_denied, device,
                    "this user may not open it; root can allow it (chmod 0666 /dev/fuse), or mount");
    }
    if (geteuid() != 0 && find_fusermount().empty()) {
        return fail(Errc::unsupported, "fusermount3",
                    "users other than root mount by this program; install it (Debian: fuse3)");
    }
    return {};
}

Result<FileDescriptor> mount(const std::string& target, const struct stat& point, const MountOptions& options) {
    const auto settings =
        fmt::format("default_permissions,max_read={}{}", max_transfer, options.allow_other ? ",allow_other" : "");
    FileDescriptor connection(open(device, O_RDWR | O_CLOEXEC));
    if (connection.get() < 0) return system_error("cannot be opened", device, errno);
    const auto all = fmt::format("fd={},rootmode={:o},user_id={},group_id={},{}", connection.get(),
                                 point.st_mode & S_IFMT, geteuid(), getegid(), settings);
    const auto flags = MS_NOSUID | MS_NODEV | (options.read_only ? std::uint64_t{MS_RDONLY} : 0);
    if (::mount("qcow", target.c_str(), "fuse.qcow", flags, all.c_str()) == 0) return connection;
    if (errno != EPERM || geteuid() == 0) {
        return fail(Errc::access_denied, target, fmt::format("cannot be mounted on: {}", std::strerror(errno)));
    }
    return mount_by_program(
        target, fmt::format("{},nosuid,nodev,fsname=qcow,subtype=qcow,{}", options.read_only ? "ro" : "rw", settings));
}

}  // namespace fuse

void Mount::unmount(const std::string& target) {
    {
        const FileDescriptor file(open(target.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
        if (file.get() >= 0) ::fsync(file.get());
    }
    if (umount2(target.c_str(), MNT_DETACH) == 0 || geteuid() == 0) return;
    fuse::run_fusermount({"fusermount3", "-u", "-q", "-z", "--", target}, -1);
}

}  // namespace qcow
