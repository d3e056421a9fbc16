#include "server/nbd_client.h"

namespace qcow::test {

Bytes with_length(std::string_view text) { return (Wire() << static_cast<std::uint32_t>(text.size()) << text).bytes; }

NbdClient::NbdClient(const std::string& path) : fd_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
    if (connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
        throw std::runtime_error("cannot connect to " + path);
    const timeval timeout = {20, 0};  // a server that does not answer is not to hang the tests
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
}

void NbdClient::hang_up() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
}

void NbdClient::send(std::span<const std::byte> bytes) const {
    while (!bytes.empty()) {
        const auto n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
        if (n <= 0) throw Closed();
        bytes = bytes.subspan(static_cast<std::size_t>(n));
    }
}

std::size_t NbdClient::send_until_stuck(std::span<const std::byte> bytes) const {
    std::size_t done = 0;
    while (done < bytes.size()) {
        pollfd polled = {fd_, POLLOUT, 0};
        if (poll(&polled, 1, 500) <= 0) break;
        const auto n = ::send(fd_, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n <= 0) break;
        done += static_cast<std::size_t>(n);
    }
    return done;
}

Bytes NbdClient::receive(std::size_t count) const {
    Bytes bytes(count);
    for (std::size_t done = 0; done < count;) {
        const auto n = recv(fd_, bytes.data() + done, count - done, 0);
        if (n < 0 && errno == EAGAIN) throw std::runtime_error("the server does not answer");
        if (n <= 0) throw Closed();
        done += static_cast<std::size_t>(n);
    }
    return bytes;
}

bool NbdClient::is_closed() const {
    try {
        for (;;) static_cast<void>(receive(1));
    } catch (const Closed&) {
        return true;
    }
}

void NbdClient::greet(std::uint32_t flags) {
    if (number<std::uint64_t>() != nbd::init_magic || number<std::uint64_t>() != nbd::option_magic ||
        number<std::uint16_t>() != 3)
        throw std::runtime_error("not an NBD server");
    send(Wire() << flags);
}

void NbdClient::send_option(nbd::Option option, std::span<const std::byte> data) {
    send(Wire() << nbd::option_magic << static_cast<std::uint32_t>(option) << static_cast<std::uint32_t>(data.size())
                << data);
}

NbdClient::Reply NbdClient::option_reply(nbd::Option option) {
    if (number<std::uint64_t>() != nbd::option_reply_magic) throw std::runtime_error("bad reply magic");
    if (number<std::uint32_t>() != static_cast<std::uint32_t>(option)) throw std::runtime_error("not this option");
    const auto type = static_cast<nbd::OptionReply>(number<std::uint32_t>());
    const auto length = number<std::uint32_t>();
    return {type, receive(length)};
}

std::vector<NbdClient::Reply> NbdClient::ask(nbd::Option option, std::span<const std::byte> data) {
    send_option(option, data);
    std::vector<Reply> replies;
    do {
        replies.push_back(option_reply(option));
    } while (replies.back().type != nbd::OptionReply::ack &&
             static_cast<std::uint32_t>(replies.back().type) < 0x80000000);
    return replies;
}

nbd::OptionReply NbdClient::outcome(nbd::Option option, std::span<const std::byte> data) {
    return ask(option, data).back().type;
}

Bytes NbdClient::query_data(std::string_view name, const std::vector<std::string>& queries) {
    Wire wire;
    wire << with_length(name) << static_cast<std::uint32_t>(queries.size());
    for (const auto& query : queries) wire << with_length(query);
    return wire.bytes;
}

void NbdClient::go(nbd::Style style, const std::vector<std::string>& contexts, std::string_view name) {
    greet();
    negotiate(style, contexts, name);
}

void NbdClient::negotiate(nbd::Style style, const std::vector<std::string>& contexts, std::string_view name) {
    style_ = style;
    if (style != nbd::Style::simple)
        must_ack(style == nbd::Style::extended ? nbd::Option::extended_headers : nbd::Option::structured_reply, {});
    if (!contexts.empty()) must_ack(nbd::Option::set_meta_context, query_data(name, contexts));
    must_ack(nbd::Option::go, go_data(name));
}

Wire NbdClient::request(nbd::Command command, std::uint64_t offset, std::uint64_t length, std::uint16_t flags,
                        std::uint64_t cookie) const {
    const bool extended = style_ == nbd::Style::extended;
    if (extended && command == nbd::Command::write) flags |= nbd::command_flag::payload_length;
    Wire wire;
    wire << std::uint32_t{extended ? 0x21e41c71U : 0x25609513U} << flags << static_cast<std::uint16_t>(command)
         << cookie << offset;
    if (extended) {
        wire << length;
    } else {
        wire << static_cast<std::uint32_t>(length);
    }
    return wire;
}

NbdClient::Chunk NbdClient::chunk(std::size_t simple_data) {
    Chunk result;
    const auto magic = number<std::uint32_t>();
    if (magic == 0x67446698 && style_ != nbd::Style::extended) {
        result.error = number<std::uint32_t>();
        result.cookie = number<std::uint64_t>();
        result.done = true;
        if (result.error == 0) result.data = receive(simple_data);
        return result;
    }
    if (magic != (style_ == nbd::Style::extended ? 0x6e8a278c : 0x668e33ef))
        throw std::runtime_error("bad chunk magic");
    result.done = (number<std::uint16_t>() & 1) != 0;
    result.type = number<std::uint16_t>();
    result.cookie = number<std::uint64_t>();
    if (style_ == nbd::Style::extended) number<std::uint64_t>();
    const std::uint64_t length = style_ == nbd::Style::extended ? number<std::uint64_t>() : number<std::uint32_t>();
    result.data = receive(length);
    if (result.type == nbd::chunk_type::error) {
        result.error = load_be<std::uint32_t>(result.data, 0);
        result.data.erase(result.data.begin(), result.data.begin() + 6);
    }
    return result;
}

std::uint32_t NbdClient::command(nbd::Command command, std::uint64_t offset, std::uint64_t length, std::uint16_t flags,
                                 std::span<const std::byte> payload) {
    send(request(command, offset, length, flags) << payload);
    const auto reply = chunk();
    if (!reply.done) throw std::runtime_error("the reply is not complete");
    return reply.error;
}

std::uint32_t NbdClient::write(std::uint64_t offset, std::span<const std::byte> bytes, std::uint16_t flags) {
    return command(nbd::Command::write, offset, bytes.size(), flags, bytes);
}

NbdClient::Read NbdClient::read(std::uint64_t offset, std::size_t length, std::uint16_t flags) {
    send(request(nbd::Command::read, offset, length, flags));
    Read result;
    result.bytes.assign(length, std::byte{0xee});
    for (;;) {
        const auto part = chunk(length);
        if (part.error != 0) {
            result.error = part.error;
        } else if (style_ == nbd::Style::simple) {
            result.bytes = part.data;
        } else if (part.type == nbd::chunk_type::offset_data || part.type == nbd::chunk_type::offset_hole) {
            const bool hole = part.type == nbd::chunk_type::offset_hole;
            const auto at = load_be<std::uint64_t>(part.data, 0) - offset;
            const auto count = hole ? load_be<std::uint32_t>(part.data, 8) : part.data.size() - 8;
            if (at > length || count > length - at) throw std::runtime_error("a chunk outside of the request");
            for (std::size_t i = 0; i < count; ++i) result.bytes[at + i] = hole ? std::byte{0} : part.data[8 + i];
            ++(hole ? result.holes : result.data_chunks);
        }
        if (part.done) return result;
    }
}

}  // namespace qcow::test
