#pragma once
// The NBD protocol's numbers and messages: bytes in, structures out, and back. No input or output here.

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "qcow/error.h"

namespace qcow::nbd {

// The handshake.

inline constexpr std::uint64_t init_magic = 0x4e42444d41474943;    // "NBDMAGIC"
inline constexpr std::uint64_t option_magic = 0x49484156454f5054;  // "IHAVEOPT"
inline constexpr std::uint64_t option_reply_magic = 0x0003e889045565a9;

inline constexpr std::uint32_t handshake_fixed_newstyle = 1;
inline constexpr std::uint32_t handshake_no_zeroes = 2;

enum class Option : std::uint32_t {
    export_name = 1,
    abort = 2,
    list = 3,
    starttls = 5,
    info = 6,
    go = 7,
    structured_reply = 8,
    list_meta_context = 9,
    set_meta_context = 10,
    extended_headers = 11,
};

enum class OptionReply : std::uint32_t {
    ack = 1,
    server = 2,
    info = 3,
    meta_context = 4,
    unsupported = 0x80000001,
    policy = 0x80000002,
    invalid = 0x80000003,
    platform = 0x80000004,
    tls_required = 0x80000005,
    unknown = 0x80000006,
    too_big = 0x80000009,
    extended_headers_required = 0x8000000a,
};

enum class Info : std::uint16_t { export_info = 0, name = 1, description = 2, block_size = 3 };

/// What a string may be at most.
inline constexpr std::size_t max_string = 4096;

/// What an export is and can, in the handshake.
namespace transmission_flag {
inline constexpr std::uint16_t has_flags = 1 << 0;
inline constexpr std::uint16_t read_only = 1 << 1;
inline constexpr std::uint16_t send_flush = 1 << 2;
inline constexpr std::uint16_t send_fua = 1 << 3;
inline constexpr std::uint16_t send_trim = 1 << 5;
inline constexpr std::uint16_t send_write_zeroes = 1 << 6;
inline constexpr std::uint16_t send_df = 1 << 7;
inline constexpr std::uint16_t can_multi_conn = 1 << 8;
inline constexpr std::uint16_t send_cache = 1 << 10;
inline constexpr std::uint16_t send_fast_zero = 1 << 11;
inline constexpr std::uint16_t block_status_payload = 1 << 12;
}  // namespace transmission_flag

/// What the client asks for with an option.
struct OptionHeader {
    static constexpr std::size_t size = 16;
    Option option = {};
    std::uint32_t length = 0;  ///< bytes of data behind it
};

/// Nothing unless the magic number is right.
std::optional<OptionHeader> parse_option(std::span<const std::byte, OptionHeader::size> bytes);

/// Takes numbers and strings from the front of an option's data. Once something is missing, all that follows is, too.
class OptionData {
public:
    explicit OptionData(std::span<const std::byte> bytes) : rest_(bytes) {}

    template <class T>
    std::optional<T> number();

    /// A string with its length in 32 bits in front, of at most max_string bytes.
    std::optional<std::string_view> string();

    [[nodiscard]] bool empty() const { return rest_.empty(); }

private:
    std::optional<std::span<const std::byte>> take(std::size_t count);

    std::span<const std::byte> rest_;
    bool failed_ = false;
};

// The transmission.

/// Bytes that a request may carry, or ask to be sent, at most.
inline constexpr std::uint64_t max_payload = std::uint64_t{32} << 20;

enum class Command : std::uint16_t {
    read = 0,
    write = 1,
    disconnect = 2,
    flush = 3,
    trim = 4,
    cache = 5,
    write_zeroes = 6,
    block_status = 7,
};
inline constexpr std::size_t command_count = 8;

namespace command_flag {
inline constexpr std::uint16_t fua = 1 << 0;
inline constexpr std::uint16_t no_hole = 1 << 1;
inline constexpr std::uint16_t df = 1 << 2;
inline constexpr std::uint16_t req_one = 1 << 3;
inline constexpr std::uint16_t fast_zero = 1 << 4;
inline constexpr std::uint16_t payload_length = 1 << 5;
}  // namespace command_flag

/// In which form requests and replies come.
enum class Style : std::uint8_t {
    simple,      ///< one reply a request, without types
    structured,  ///< replies in typed chunks
    extended,    ///< the same, and 64-bit lengths in both directions
};

struct Request {
    std::uint16_t flags = 0;
    Command command = {};
    std::uint64_t cookie = 0;  ///< the client's name for it
    std::uint64_t offset = 0;
    std::uint64_t length = 0;

    [[nodiscard]] bool has(std::uint16_t flag) const { return (flags & flag) != 0; }
};

constexpr std::size_t request_size(Style style) { return style == Style::extended ? 32 : 28; }

/// `bytes` are request_size(style). Nothing unless the magic number is right.
std::optional<Request> parse_request(std::span<const std::byte> bytes, Style style);

/// What a request for the status of a range may carry: its length and the ids of contexts.
inline constexpr std::uint64_t max_status_payload = 8 + 4 * 64;

/// How many bytes follow a request.
std::uint64_t payload_size(const Request& request, Style style);

/// Errors, in the protocol's numbers.
enum class Failure : std::uint32_t {
    not_permitted = 1,
    io = 5,
    no_memory = 12,
    invalid = 22,
    no_space = 28,
    overflow = 75,
    not_supported = 95,
    shutdown = 108,
};

Failure failure_from(Errc code);

/// What a request may not be whatever the disk says of it.
struct Refusal {
    Failure failure = {};
    std::string_view why;
};

/// What must be known of an export to judge a request.
struct Bounds {
    std::uint64_t size = 0;
    bool read_only = false;
    std::uint64_t chunk = 0;  ///< the largest piece of data in one chunk
};

/// Returns nothing if the request makes sense, and its range lies within the disk.
std::optional<Refusal> refuse(const Request& request, Style style, const Bounds& bounds);

namespace chunk_type {
inline constexpr std::uint16_t none = 0;
inline constexpr std::uint16_t offset_data = 1;
inline constexpr std::uint16_t offset_hole = 2;
inline constexpr std::uint16_t block_status = 5;
inline constexpr std::uint16_t block_status_ext = 6;
inline constexpr std::uint16_t error = 0x8001;
}  // namespace chunk_type

inline constexpr std::size_t simple_reply_size = 16;
constexpr std::size_t chunk_header_size(Style style) { return style == Style::extended ? 32 : 20; }

/// A simple reply's header; failure 0 is success.
void put_simple_reply(std::span<std::byte> to, const Request& request, std::uint32_t failure);

/// The header of a chunk with `length` bytes behind it.
void put_chunk(std::span<std::byte> to, Style style, const Request& request, std::uint16_t type, bool done,
               std::size_t length);

}  // namespace qcow::nbd
