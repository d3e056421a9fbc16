#pragma once
// Names of partition types, and the texts of identifiers.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace qcow {

/// "Linux", ...; empty: not known.
std::string mbr_type_name(std::uint8_t type);

/// "Linux filesystem", ... for a GUID in small letters; empty: not known.
std::string gpt_type_name(std::string_view guid);

/// The text of a GUID of 16 bytes, whose first three fields are little-endian.
std::string guid_text(std::span<const std::byte> guid);

/// The text of a UUID of 16 bytes, all big-endian.
std::string uuid_text(std::span<const std::byte> uuid);

/// UTF-8 for the little-endian (or big-endian) UTF-16 in front of the first zero. Lone surrogates become U+FFFD.
std::string utf16_text(std::span<const std::byte> text, bool big_endian = false);

/// The text in UTF-16; nothing if it is no UTF-8.
std::optional<std::u16string> utf16(std::string_view text);

}  // namespace qcow
