#include "format/luks.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "base/bits.h"
#include "base/endian.h"
#include "base/try.h"

namespace qcow::format {
namespace {

constexpr std::string_view luks_magic("LUKS\xba\xbe", 6);
constexpr std::size_t first_slot = 208;
constexpr std::size_t slot_bytes = 48;
constexpr std::uint32_t max_key_bytes = 1024;
constexpr std::uint32_t slot_enabled = 0x00ac71f3;
constexpr std::uint32_t slot_disabled = 0x0000dead;

std::string padded_text(std::span<const std::byte> bytes) {
    std::string result(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    result.resize(std::min(result.find('\0'), result.size()));
    return result;
}

/// The field ends with a zero.
void put_text(std::span<std::byte> field, std::string_view text) {
    std::ranges::copy(as_bytes(text.substr(0, field.size() - 1)), field.begin());
}

std::unexpected<Error> bad(std::string what) { return fail(Errc::corrupt, "LUKS header", std::move(what)); }

}  // namespace

bool is_luks(std::span<const std::byte> start) {
    return start.size() >= luks_magic.size() &&
           std::ranges::equal(start.first(luks_magic.size()), as_bytes(luks_magic));
}

bool is_luks2(std::span<const std::byte> start) {
    return start.size() >= luks_magic.size() + 2 && is_luks(start) &&
           load_be<std::uint16_t>(start, luks_magic.size()) == 2;
}

Result<Luks1Header> parse_luks1_header(std::span<const std::byte> in) {
    if (in.size() < luks1_header_bytes)
        return bad(fmt::format("{} bytes instead of {}", in.size(), luks1_header_bytes));
    if (!is_luks(in)) return bad(R"(it does not begin with "LUKS\xba\xbe")");
    if (const auto version = load_be<std::uint16_t>(in, 6); version != 1)
        return fail(Errc::unsupported, "LUKS header", fmt::format("version {} instead of 1", version));
    Luks1Header header;
    header.cipher = padded_text(in.subspan(8, 32));
    header.mode = padded_text(in.subspan(40, 32));
    header.hash = padded_text(in.subspan(72, 32));
    header.payload_sector = load_be<std::uint32_t>(in, 104);
    header.key_bytes = load_be<std::uint32_t>(in, 108);
    if (header.key_bytes > max_key_bytes) return bad(fmt::format("a key of {} bytes", header.key_bytes));
    std::ranges::copy(in.subspan(112, header.digest.size()), header.digest.begin());
    std::ranges::copy(in.subspan(132, header.salt.size()), header.salt.begin());
    header.iterations = load_be<std::uint32_t>(in, 164);
    header.uuid = padded_text(in.subspan(168, 40));
    for (std::size_t i = 0; i < header.slots.size(); ++i) {
        const auto bytes = in.subspan(first_slot + i * slot_bytes, slot_bytes);
        auto& slot = header.slots[i];
        const auto state = load_be<std::uint32_t>(bytes, 0);
        slot.used = state == slot_enabled;
        slot.marked = slot.used || state == slot_disabled;
        slot.iterations = load_be<std::uint32_t>(bytes, 4);
        std::ranges::copy(bytes.subspan(8, slot.salt.size()), slot.salt.begin());
        slot.material_sector = load_be<std::uint32_t>(bytes, 40);
        slot.stripes = load_be<std::uint32_t>(bytes, 44);
    }
    return header;
}

Result<void> verify_luks1(const Luks1Header& header, std::uint64_t area_bytes) {
    if (header.key_bytes == 0) return bad("a key of 0 bytes");
    if (header.iterations == 0) return bad("0 iterations for the digest of the key");
    if (header.cipher.empty()) return bad("no name of a cipher");
    if (header.mode.empty()) return bad("no name of a cipher mode");
    if (header.hash.empty()) return bad("no name of a hash");
    const std::uint64_t length = divide_up(header.material_bytes(), luks_sector_bytes) * luks_sector_bytes;
    const auto start = [&](std::size_t slot) {
        return std::uint64_t{header.slots[slot].material_sector} * luks_sector_bytes;
    };
    for (std::size_t i = 0; i < header.slots.size(); ++i) {
        const auto& slot = header.slots[i];
        if (slot.stripes != luks_stripes) {
            return fail(Errc::unsupported, "LUKS header",
                        fmt::format("key slot {} has {} stripes instead of {}", i, slot.stripes, luks_stripes));
        }
        if (slot.used && slot.iterations == 0) return bad(fmt::format("key slot {} has 0 iterations", i));
        if (start(i) < luks1_header_bytes)
            return bad(fmt::format("the key material of slot {} overlaps the header", i));
        if (!lies_within(start(i), length, area_bytes)) {
            return bad(
                fmt::format("the key material of slot {} at offset {:#x} ends past the end of the header ({} "
                            "bytes)",
                            i, start(i), area_bytes));
        }
        for (std::size_t other = 0; other < i; ++other) {
            if (start(i) < start(other) + length && start(other) < start(i) + length)
                return bad(fmt::format("the key materials of slots {} and {} overlap", other, i));
        }
    }
    return {};
}

std::vector<std::byte> encode_luks1_header(const Luks1Header& header) {
    std::vector<std::byte> bytes(luks1_header_bytes);
    const std::span<std::byte> out(bytes);
    std::ranges::copy(as_bytes(luks_magic), out.begin());
    store_be<std::uint16_t>(out, 6, 1);
    put_text(out.subspan(8, 32), header.cipher);
    put_text(out.subspan(40, 32), header.mode);
    put_text(out.subspan(72, 32), header.hash);
    store_be(out, 104, header.payload_sector);
    store_be(out, 108, header.key_bytes);
    std::ranges::copy(header.digest, out.subspan(112).begin());
    std::ranges::copy(header.salt, out.subspan(132).begin());
    store_be(out, 164, header.iterations);
    put_text(out.subspan(168, 40), header.uuid);
    for (std::size_t i = 0; i < header.slots.size(); ++i) {
        const auto& slot = header.slots[i];
        const auto to = out.subspan(first_slot + i * slot_bytes, slot_bytes);
        store_be(to, 0, slot.used ? slot_enabled : slot_disabled);
        store_be(to, 4, slot.iterations);
        std::ranges::copy(slot.salt, to.subspan(8).begin());
        store_be(to, 40, slot.material_sector);
        store_be(to, 44, slot.stripes);
    }
    return bytes;
}

Result<EncryptionInfo> parse_luks1(std::span<const std::byte> in) {
    const auto header = TRY(parse_luks1_header(in));
    EncryptionInfo info;
    info.method = "luks";
    info.key_bits = header.key_bytes * 8;
    info.cipher = fmt::format("{}-{}", header.cipher, header.mode);
    info.hash = header.hash;
    info.slots = static_cast<unsigned>(header.slots.size());
    for (unsigned slot = 0; slot < info.slots; ++slot)
        if (header.slots[slot].used) info.used_slots.push_back(slot);
    return info;
}

}  // namespace qcow::format
