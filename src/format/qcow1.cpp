#include "format/qcow1.h"

#include <fmt/format.h>

#include "base/endian.h"
#include "base/try.h"
#include "format/header.h"

namespace qcow::format {
namespace {

std::unexpected<Error> bad_field(std::string_view name, std::size_t at, std::string what, Errc code = Errc::corrupt) {
    return fail(code, fmt::format("header field {} (byte {})", name, at), std::move(what));
}

}  // namespace

Result<Qcow1Header> parse_qcow1_header(std::span<const std::byte> in, std::uint64_t file_size) {
    if (in.size() < qcow1_header_bytes) {
        return fail(Errc::corrupt, "header",
                    fmt::format("the file has {} bytes, a qcow header {}", in.size(), qcow1_header_bytes));
    }
    if (load_be<std::uint32_t>(in, 0) != magic)
        return bad_field("magic", 0, R"(not a qcow image: it does not begin with "QFI\xfb")");
    if (const auto version = load_be<std::uint32_t>(in, 4); version != 1) {
        return bad_field("version", 4, fmt::format("{} is not 1", version), Errc::unsupported);
    }
    Qcow1Header h;
    h.backing_name_offset = load_be<std::uint64_t>(in, 8);
    h.backing_name_length = load_be<std::uint32_t>(in, 16);
    h.size = load_be<std::uint64_t>(in, 24);
    h.cluster_bits = static_cast<std::uint8_t>(in[32]);
    h.l2_bits = static_cast<std::uint8_t>(in[33]);
    const auto crypt = load_be<std::uint32_t>(in, 36);
    h.l1_table = {load_be<std::uint64_t>(in, 40)};

    if (h.cluster_bits < 9 || h.cluster_bits > 16)
        return bad_field("cluster_bits", 32, fmt::format("{} is outside of 9 to 16", h.cluster_bits));
    if (h.l2_bits < 6 || h.l2_bits > 13)
        return bad_field("l2_bits", 33, fmt::format("{} is outside of 6 to 13", h.l2_bits));
    if (crypt > 1) {
        return bad_field("crypt_method", 36, fmt::format("{} is neither none (0) nor AES (1)", crypt),
                         Errc::unsupported);
    }
    h.encrypted = crypt == 1;
    if (h.backing_name_offset != 0 && (h.backing_name_length > max_name_length ||
                                       !lies_within(h.backing_name_offset, h.backing_name_length, file_size))) {
        return bad_field("backing_file_offset", 8,
                         fmt::format("a name of {} bytes at {:#x}: it must lie in the file and have at most {} bytes",
                                     h.backing_name_length, h.backing_name_offset, max_name_length));
    }
    if (h.size >= bit(63)) return bad_field("size", 24, fmt::format("{} bytes are more than any disk has", h.size));
    if (h.l1_entries() > max_l1_bytes / 8) {
        return bad_field("size", 24, fmt::format("{} bytes need an L1 table of more than 32 MiB", h.size),
                         Errc::limit_exceeded);
    }
    if (h.l1_entries() != 0 &&
        (h.l1_table.value == 0 || !lies_within(h.l1_table.value, h.l1_entries() * 8, max_host_offset))) {
        return bad_field("l1_table_offset", 40,
                         fmt::format("{} entries cannot lie at {:#x}", h.l1_entries(), h.l1_table.value));
    }
    return h;
}

}  // namespace qcow::format
