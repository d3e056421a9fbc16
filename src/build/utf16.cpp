#include "build/utf16.h"

#include <array>
#include <cstdint>

namespace qcow {

std::optional<std::u16string> utf16(std::string_view text) {
    std::u16string result;
    for (std::size_t i = 0; i < text.size();) {
        const auto first = static_cast<std::uint8_t>(text[i]);
        const std::size_t length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
        if ((first >= 0x80 && first < 0xc2) || first > 0xf4 || i + length > text.size()) return {};
        std::uint32_t value = length == 1 ? first : first & (0x7fU >> length);
        for (std::size_t k = 1; k < length; ++k) {
            const auto next = static_cast<std::uint8_t>(text[i + k]);
            if ((next & 0xc0) != 0x80) return {};
            value = value << 6 | (next & 0x3f);
        }
        constexpr std::array<std::uint32_t, 5> least = {0, 0, 0x80, 0x800, 0x10000};
        if (value < least[length] || value > 0x10ffff || (value >= 0xd800 && value < 0xe000)) return {};
        if (value >= 0x10000) {
            result += static_cast<char16_t>(0xd800 + ((value - 0x10000) >> 10));
            result += static_cast<char16_t>(0xdc00 + ((value - 0x10000) & 0x3ff));
        } else {
            result += static_cast<char16_t>(value);
        }
        i += length;
    }
    return result;
}

}  // namespace qcow
