#include "format/luks.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "base/bits.h"
#include "base/endian.h"
#include "base/try.h"

namespace qcow::format {
namespace {

std::string padded_text(std::span<const std::byte> bytes) {
    std::string result(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    result.resize(std::min(result.find('\0'), result.size()));
    return result;
}

}  // namespace

Result<EncryptionInfo> parse_luks1(std::span<const std::byte> in) {
    constexpr std::string_view magic("LUKS\xba\xbe", 6);
    constexpr std::size_t first_slot = 208;
    constexpr std::size_t slot_bytes = 48;
    constexpr std::uint32_t max_key_bytes = 1024;
    constexpr std::uint32_t slot_enabled = 0x00ac71f3;

    if (in.size() < luks1_header_bytes) {
        return fail(Errc::corrupt, "LUKS header", fmt::format("{} bytes instead of {}", in.size(), luks1_header_bytes));
    }
    if (!std::ranges::equal(in.first(magic.size()), as_bytes(magic)))
        return fail(Errc::corrupt, "LUKS header", R"(it does not begin with "LUKS\xba\xbe")");
    if (const auto version = load_be<std::uint16_t>(in, 6); version != 1) {
        return fail(Errc::unsupported, "LUKS header", fmt::format("version {} instead of 1", version));
    }
    EncryptionInfo info;
    info.method = "luks";
    const auto key_bytes = load_be<std::uint32_t>(in, 108);
    if (key_bytes > max_key_bytes)
        return fail(Errc::corrupt, "LUKS header", fmt::format("a key of {} bytes", key_bytes));
    info.key_bits = key_bytes * 8;
    info.cipher = fmt::format("{}-{}", padded_text(in.subspan(8, 32)), padded_text(in.subspan(40, 32)));
    info.hash = padded_text(in.subspan(72, 32));
    info.slots = 8;
    for (unsigned slot = 0; slot < info.slots; ++slot) {
        if (load_be<std::uint32_t>(in, first_slot + slot * slot_bytes) == slot_enabled) info.used_slots.push_back(slot);
    }
    return info;
}

}  // namespace qcow::format
