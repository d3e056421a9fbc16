#include "qcow/text.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdint>

namespace qcow {
namespace {

/// Length of the well-formed UTF-8 sequence at the front of `text` (RFC 3629, section 4), 0 if there is none.
std::size_t utf8_length(std::string_view text) {
    const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<std::uint8_t>(text[i]) : 0U; };
    const auto continues = [&](std::size_t i, unsigned low = 0x80, unsigned high = 0xbf) {
        return byte(i) >= low && byte(i) <= high;
    };
    const unsigned first = byte(0);
    if (first < 0x80) return 1;
    if (first >= 0xc2 && first <= 0xdf) return continues(1) ? 2 : 0;
    if (first >= 0xe0 && first <= 0xef) {
        const bool second = continues(1, first == 0xe0 ? 0xa0 : 0x80, first == 0xed ? 0x9f : 0xbf);
        return second && continues(2) ? 3 : 0;
    }
    if (first >= 0xf0 && first <= 0xf4) {
        const bool second = continues(1, first == 0xf0 ? 0x90 : 0x80, first == 0xf4 ? 0x8f : 0xbf);
        return second && continues(2) && continues(3) ? 4 : 0;
    }
    return 0;
}

bool is_control(std::string_view sequence) {
    const auto first = static_cast<std::uint8_t>(sequence[0]);
    // U+0080 to U+009F, the C1 controls, are encoded as c2 80 to c2 9f.
    const bool c1 = sequence.size() == 2 && first == 0xc2 && static_cast<std::uint8_t>(sequence[1]) < 0xa0;
    return c1 || first < 0x20 || first == 0x7f;
}

/// Embeddings, overrides and isolates (U+202A to U+202E, U+2066 to U+2069): text behind them is shown in another order
/// than it has.
bool changes_direction(std::string_view sequence) {
    if (sequence.size() != 3 || static_cast<std::uint8_t>(sequence[0]) != 0xe2) return false;
    const auto second = static_cast<std::uint8_t>(sequence[1]);
    const auto third = static_cast<std::uint8_t>(sequence[2]);
    return (second == 0x80 && third >= 0xaa && third <= 0xae) || (second == 0x81 && third >= 0xa6 && third <= 0xa9);
}

/// One character, or a byte that is none; `length` as of utf8_length.
std::string shown(std::string_view sequence, std::size_t length) {
    if (length != 0 && !is_control(sequence) && !changes_direction(sequence)) return std::string(sequence);
    constexpr std::string_view digits = "0123456789abcdef";
    std::string escaped;
    for (const char c : sequence) {
        const auto byte = static_cast<std::uint8_t>(c);
        escaped += {'\\', 'x', digits[byte / 16], digits[byte % 16]};
    }
    return escaped;
}

std::string lower(std::string_view text) {
    std::string result(text);
    for (auto& c : result) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return result;
}

/// Returns the number of letters that are inserted, left out, replaced or swapped with their neighbour.
std::size_t edit_distance(std::string_view a, std::string_view b) {
    std::vector<std::vector<std::size_t>> d(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
    for (std::size_t i = 0; i <= a.size(); ++i) {
        for (std::size_t k = 0; k <= b.size(); ++k) {
            if (i == 0 || k == 0) {
                d[i][k] = i + k;
                continue;
            }
            d[i][k] = std::min({d[i - 1][k] + 1, d[i][k - 1] + 1, d[i - 1][k - 1] + (a[i - 1] != b[k - 1] ? 1 : 0)});
            if (i > 1 && k > 1 && a[i - 1] == b[k - 2] && a[i - 2] == b[k - 1])
                d[i][k] = std::min(d[i][k], d[i - 2][k - 2] + 1);
        }
    }
    return d[a.size()][b.size()];
}

}  // namespace

std::string printable(std::string_view text, std::size_t max_bytes) {
    std::string result;
    while (!text.empty()) {
        const std::size_t length = utf8_length(text);
        const auto taken = text.substr(0, length == 0 ? 1 : length);
        const auto more = shown(taken, length);
        if (more.size() > max_bytes - result.size()) return result + "...";
        result += more;
        text.remove_prefix(taken.size());
    }
    return result;
}

std::string unprintable(std::string_view text) {
    std::string bytes;
    while (!text.empty()) {
        std::uint8_t byte = 0;
        const auto* const digits = text.data() + 2;
        if (text.size() >= 4 && text.starts_with("\\x") &&
            std::from_chars(digits, digits + 2, byte, 16).ptr == digits + 2) {
            bytes += static_cast<char>(byte);
            text.remove_prefix(4);
        } else {
            bytes += text.front();
            text.remove_prefix(1);
        }
    }
    return bytes;
}

bool is_utf8(std::string_view text) {
    while (!text.empty()) {
        const auto length = utf8_length(text);
        if (length == 0) return false;
        text.remove_prefix(length);
    }
    return true;
}

std::string did_you_mean(std::string_view text, const std::vector<std::string>& words) {
    constexpr std::size_t longest = 64;  // longer texts are no typing mistakes
    if (text.size() > longest) return {};
    const auto said = lower(text);
    std::string_view best;
    std::size_t fewest = longest;
    for (const auto& word : words) {
        const auto known = lower(word);
        auto distance = edit_distance(said, known);
        if (said.size() >= 3 && known.starts_with(said)) distance = std::min<std::size_t>(distance, 1);
        if (distance >= fewest || distance > std::max(said.size(), known.size()) / 3) continue;
        fewest = distance;
        best = word;
    }
    return best.empty() ? std::string() : fmt::format("; did you mean \"{}\"?", best);
}

}  // namespace qcow
