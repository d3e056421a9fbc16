#include "server/nbd/protocol.h"

#include "base/bits.h"
#include "base/endian.h"

namespace qcow::nbd {
namespace {

constexpr std::uint32_t request_magic = 0x25609513;
constexpr std::uint32_t extended_request_magic = 0x21e41c71;
constexpr std::uint32_t simple_reply_magic = 0x67446698;
constexpr std::uint32_t structured_reply_magic = 0x668e33ef;
constexpr std::uint32_t extended_reply_magic = 0x6e8a278c;

/// The flags that a command may have.
std::uint16_t allowed_flags(Command command, Style style) {
    // Clients set it on everything that has a payload; FUA is allowed where it means nothing.
    const std::uint16_t any = command_flag::fua;
    switch (command) {
        case Command::read: return any | (style == Style::simple ? 0 : command_flag::df);
        case Command::write: return any | (style == Style::extended ? command_flag::payload_length : 0);
        case Command::write_zeroes: return any | command_flag::no_hole | command_flag::fast_zero;
        case Command::block_status:
            return any | command_flag::req_one | (style == Style::extended ? command_flag::payload_length : 0);
        default: return any;
    }
}

bool changes_the_disk(Command command) {
    return command == Command::write || command == Command::trim || command == Command::write_zeroes;
}

}  // namespace

std::optional<OptionHeader> parse_option(std::span<const std::byte, OptionHeader::size> bytes) {
    if (load_be<std::uint64_t>(bytes, 0) != option_magic) return std::nullopt;
    return OptionHeader{static_cast<Option>(load_be<std::uint32_t>(bytes, 8)), load_be<std::uint32_t>(bytes, 12)};
}

std::optional<std::span<const std::byte>> OptionData::take(std::size_t count) {
    if (failed_ || count > rest_.size()) {
        failed_ = true;
        return std::nullopt;
    }
    const auto taken = rest_.first(count);
    rest_ = rest_.subspan(count);
    return taken;
}

template <class T>
std::optional<T> OptionData::number() {
    const auto bytes = take(sizeof(T));
    if (!bytes) return std::nullopt;
    return load_be<T>(*bytes, 0);
}

template std::optional<std::uint16_t> OptionData::number();
template std::optional<std::uint32_t> OptionData::number();

std::optional<std::string_view> OptionData::string() {
    const auto length = number<std::uint32_t>();
    if (!length || *length > max_string) {
        failed_ = true;
        return std::nullopt;
    }
    const auto bytes = take(*length);
    if (!bytes) return std::nullopt;
    return std::string_view(reinterpret_cast<const char*>(bytes->data()), bytes->size());
}

std::optional<Request> parse_request(std::span<const std::byte> bytes, Style style) {
    const bool extended = style == Style::extended;
    if (load_be<std::uint32_t>(bytes, 0) != (extended ? extended_request_magic : request_magic)) return std::nullopt;
    Request request;
    request.flags = load_be<std::uint16_t>(bytes, 4);
    request.command = static_cast<Command>(load_be<std::uint16_t>(bytes, 6));
    request.cookie = load_be<std::uint64_t>(bytes, 8);
    request.offset = load_be<std::uint64_t>(bytes, 16);
    request.length = extended ? load_be<std::uint64_t>(bytes, 24) : load_be<std::uint32_t>(bytes, 24);
    return request;
}

std::uint64_t payload_size(const Request& request, Style style) {
    const bool payload =
        request.command == Command::write || (style == Style::extended && request.has(command_flag::payload_length));
    return payload ? request.length : 0;
}

Failure failure_from(Errc code) {
    switch (code) {
        case Errc::invalid_argument: return Failure::invalid;
        case Errc::access_denied:
        case Errc::read_only:
        case Errc::refused_by_policy: return Failure::not_permitted;
        case Errc::no_space: return Failure::no_space;
        case Errc::limit_exceeded:
        case Errc::no_memory: return Failure::no_memory;
        case Errc::unsupported: return Failure::not_supported;
        default: return Failure::io;
    }
}

std::optional<Refusal> refuse(const Request& request, Style style, const Bounds& bounds) {
    if (static_cast<std::size_t>(request.command) >= command_count) return Refusal{Failure::invalid, "unknown command"};
    if ((request.flags & ~allowed_flags(request.command, style)) != 0)
        return Refusal{Failure::invalid, "a flag that the command does not have"};
    if (request.command == Command::flush || request.command == Command::disconnect) return std::nullopt;
    if (bounds.read_only && changes_the_disk(request.command))
        return Refusal{Failure::not_permitted, "the export is read-only"};
    if (request.command == Command::block_status) {
        if (style == Style::simple) return Refusal{Failure::invalid, "structured replies were not negotiated"};
        if (request.has(command_flag::payload_length)) {
            // The length is that of the payload: a 64-bit length, and 32-bit ids.
            const bool sound = request.length >= 12 && request.length <= max_status_payload && request.length % 4 == 0;
            return sound ? std::nullopt : std::optional(Refusal{Failure::invalid, "a payload of this length"});
        }
        if (request.length == 0) return Refusal{Failure::invalid, "the status of nothing"};
    }
    if (!lies_within(request.offset, request.length, bounds.size)) {
        return Refusal{changes_the_disk(request.command) ? Failure::no_space : Failure::invalid,
                       "the range reaches past the end of the export"};
    }
    if (request.command == Command::read) {
        if (request.length > max_payload) return Refusal{Failure::invalid, "more than 32 MiB at once"};
        if (request.has(command_flag::df) && request.length > bounds.chunk)
            return Refusal{Failure::overflow, "too long to be sent in one piece"};
    }
    return std::nullopt;
}

void put_simple_reply(std::span<std::byte> to, const Request& request, std::uint32_t failure) {
    store_be<std::uint32_t>(to, 0, simple_reply_magic);
    store_be<std::uint32_t>(to, 4, failure);
    store_be<std::uint64_t>(to, 8, request.cookie);
}

void put_chunk(std::span<std::byte> to, Style style, const Request& request, std::uint16_t type, bool done,
               std::size_t length) {
    const bool extended = style == Style::extended;
    store_be<std::uint32_t>(to, 0, extended ? extended_reply_magic : structured_reply_magic);
    store_be<std::uint16_t>(to, 4, done ? 1 : 0);
    store_be<std::uint16_t>(to, 6, type);
    store_be<std::uint64_t>(to, 8, request.cookie);
    if (extended) {
        store_be<std::uint64_t>(to, 16, request.offset);
        store_be<std::uint64_t>(to, 24, length);
    } else {
        store_be<std::uint32_t>(to, 16, static_cast<std::uint32_t>(length));
    }
}

}  // namespace qcow::nbd
