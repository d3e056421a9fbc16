#include "confined_messages.h"

#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>

namespace tool::messages {

using qcow::FileInfo;
using qcow::FileSystem;
using qcow::FileType;

namespace {

constexpr std::uint64_t longest_message = std::uint64_t{1} << 28;

void put(Writer& to, const std::optional<qcow::Timestamp>& time) {
    to.number(time ? 1 : 0);
    to.number(static_cast<std::uint64_t>(time ? time->seconds : 0));
    to.number(time ? time->nanoseconds : 0);
}
std::optional<qcow::Timestamp> take_time(Reader& from) {
    const bool given = from.number(1) == 1;
    const auto seconds = static_cast<std::int64_t>(from.number());
    const auto nanoseconds = static_cast<std::uint32_t>(from.number(999'999'999));
    return given ? std::optional(qcow::Timestamp{seconds, nanoseconds}) : std::nullopt;
}

bool write_all(int fd, const void* from, std::size_t length) {
    const auto* at = static_cast<const char*>(from);
    while (length > 0) {
        const auto done = ::send(fd, at, length, MSG_NOSIGNAL);  // a process that has gone is an error, no signal
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return false;
        at += done;
        length -= static_cast<std::size_t>(done);
    }
    return true;
}
bool read_all(int fd, void* to, std::size_t length) {
    auto* at = static_cast<char*>(to);
    while (length > 0) {
        const auto done = ::read(fd, at, length);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return false;
        at += done;
        length -= static_cast<std::size_t>(done);
    }
    return true;
}

}  // namespace

void put(Writer& to, const qcow::Error& error) {
    to.number(static_cast<std::uint64_t>(error.code));
    to.text(std::string_view(error.place).substr(0, longest_text));
    to.text(std::string_view(error.what).substr(0, longest_text));
}
qcow::Error take_error(Reader& from) {
    qcow::Error error;
    error.code = static_cast<qcow::Errc>(from.number(static_cast<std::uint64_t>(qcow::Errc::cancelled)));
    error.place = from.text();
    error.what = from.text();
    return error;
}

void put(Writer& to, const FileInfo& info) {
    to.number(info.inode);
    to.number(static_cast<std::uint64_t>(info.type));
    for (const std::uint64_t value : {info.mode, info.user, info.group, info.major, info.minor}) to.number(value);
    for (const std::uint64_t value : {info.links, info.size, info.stored_bytes}) to.number(value);
    for (const auto& time : {info.modified, info.accessed, info.changed, info.created}) put(to, time);
    to.number(info.deleted ? 1 : 0);
    to.number(info.encrypted ? 1 : 0);
}
FileType take_type(Reader& from) {
    return static_cast<FileType>(from.number(static_cast<std::uint64_t>(FileType::socket)));
}
FileInfo take_info(Reader& from) {
    constexpr std::uint64_t most = 0xffffffff;
    FileInfo info;
    info.inode = from.number();
    info.type = take_type(from);
    info.mode = static_cast<std::uint32_t>(from.number(07777));
    for (auto* const value : {&info.user, &info.group, &info.major, &info.minor})
        *value = static_cast<std::uint32_t>(from.number(most));
    for (auto* const value : {&info.links, &info.size, &info.stored_bytes}) *value = from.number();
    for (auto* const time : {&info.modified, &info.accessed, &info.changed, &info.created}) *time = take_time(from);
    info.deleted = from.number(1) == 1;
    info.encrypted = from.number(1) == 1;
    return info;
}

void put(Writer& to, const std::vector<qcow::Attribute>& attributes) {
    to.number(attributes.size());
    for (const auto& [name, value] : attributes) {
        to.text(name);
        to.bytes(value);
    }
}
std::vector<qcow::Attribute> take_attributes(Reader& from) {
    std::vector<qcow::Attribute> attributes(from.count(FileSystem::most_entries, 16));
    for (auto& [name, value] : attributes) {
        name = from.text();
        const auto bytes = from.bytes(FileSystem::longest_attribute);
        value.assign(bytes.begin(), bytes.end());
    }
    return attributes;
}

bool send(int fd, const Writer& message) {
    const std::uint64_t length = message.message().size();
    return write_all(fd, &length, sizeof length) && write_all(fd, message.message().data(), length);
}
std::optional<Reader> receive(int fd) {
    std::uint64_t length = 0;
    if (!read_all(fd, &length, sizeof length) || length > longest_message) return {};
    std::string bytes;
    // A length that is not true takes no memory.
    while (bytes.size() < length) {
        const auto begin = bytes.size();
        bytes.resize(std::min<std::uint64_t>(length, begin + piece_bytes));
        if (!read_all(fd, bytes.data() + begin, bytes.size() - begin)) return {};
    }
    return Reader(std::move(bytes));
}

}  // namespace tool::messages
