#include "server/vhost_user/messages.h"

#include <fmt/format.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

namespace qcow::vhost_user {
namespace {

constexpr std::size_t max_descriptors = 8;

/// Receives into all of `to`, and the descriptors that come with it. Returns false if the front end has left.
Result<bool> receive_all(int socket, std::span<std::byte> to, std::vector<FileDescriptor>& descriptors) {
    while (!to.empty()) {
        iovec piece = {to.data(), to.size()};
        alignas(cmsghdr) std::array<char, CMSG_SPACE(max_descriptors * sizeof(int))> control = {};
        msghdr message = {};
        message.msg_iov = &piece;
        message.msg_iovlen = 1;
        message.msg_control = control.data();
        message.msg_controllen = control.size();
        const auto received = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
        if (received < 0 && errno == EINTR) continue;
        if (received < 0 && errno == ECONNRESET) return false;
        if (received < 0) return system_error("cannot receive a message", "front end", errno);
        for (auto* part = CMSG_FIRSTHDR(&message); part != nullptr; part = CMSG_NXTHDR(&message, part)) {
            if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
            for (std::size_t i = 0; i < (part->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
                int fd = -1;
                std::memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
                descriptors.emplace_back(fd);
            }
        }
        if (received == 0) return false;
        if ((message.msg_flags & MSG_CTRUNC) != 0 || descriptors.size() > max_descriptors)
            return fail(Errc::corrupt, "message", "it has too many file descriptors");
        to = to.subspan(static_cast<std::size_t>(received));
    }
    return true;
}

}  // namespace

Result<std::optional<Message>> receive(int socket) {
    Message message;
    const auto header = std::as_writable_bytes(std::span(&message.header, 1));
    if (!TRY(receive_all(socket, header, message.descriptors))) return std::nullopt;
    if ((message.header.flags & version_mask) != version_1 || (message.header.flags & is_reply) != 0)
        return fail(Errc::corrupt, "message", "it is not one of version 1 of vhost-user");
    if (message.header.size > max_payload)
        return fail(Errc::corrupt, "message", fmt::format("{} bytes are too many", message.header.size));
    message.payload.resize(message.header.size);
    if (!TRY(receive_all(socket, message.payload, message.descriptors))) return std::nullopt;
    return message;
}

Result<void> send(int socket, Header header, std::span<const std::byte> payload, int descriptor) {
    header.size = static_cast<std::uint32_t>(payload.size());
    std::array<iovec, 2> pieces = {
        {{&header, sizeof header}, {const_cast<std::byte*>(payload.data()), payload.size()}}};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
    msghdr message = {};
    message.msg_iov = pieces.data();
    message.msg_iovlen = pieces.size();
    if (descriptor >= 0) {
        message.msg_control = control.data();
        message.msg_controllen = control.size();
        auto* const part = CMSG_FIRSTHDR(&message);
        part->cmsg_level = SOL_SOCKET;
        part->cmsg_type = SCM_RIGHTS;
        part->cmsg_len = CMSG_LEN(sizeof descriptor);
        std::memcpy(CMSG_DATA(part), &descriptor, sizeof descriptor);
    }
    const auto whole = sizeof header + payload.size();
    ssize_t sent = 0;
    do {
        sent = sendmsg(socket, &message, MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    // A message is far smaller than the buffer of a socket.
    if (sent != static_cast<ssize_t>(whole)) return system_error("cannot send a message", "front end", errno);
    return {};
}

}  // namespace qcow::vhost_user
