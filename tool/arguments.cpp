#include "arguments.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <expected>

#include "qemu_words.h"
#include "text.h"

namespace tool {
namespace {

enum class Mistake { not_a_number, too_large };

/// Removes the whole number at the start of `text` and returns it. Sets `base` to 10 or 16.
std::expected<std::uint64_t, Mistake> take_number(std::string_view& text, int& base) {
    while (!text.empty() && std::isspace(static_cast<unsigned char>(text[0])) != 0) text.remove_prefix(1);
    if (text.starts_with('+')) text.remove_prefix(1);
    base = text.starts_with("0x") || text.starts_with("0X") ? 16 : 10;
    if (base == 16) text.remove_prefix(2);
    std::uint64_t number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number, base);
    if (error == std::errc::result_out_of_range) return std::unexpected(Mistake::too_large);
    if (error != std::errc()) return std::unexpected(Mistake::not_a_number);
    text.remove_prefix(static_cast<std::size_t>(end - text.data()));
    return number;
}

/// Removes a decimal point and the digits after it from the start of `text`. Returns the fraction, 0 without one.
double take_fraction(std::string_view& text) {
    if (!text.starts_with('.')) return 0;
    double fraction = 0;
    const auto [end, error] =
        std::from_chars(text.data(), text.data() + text.size(), fraction, std::chars_format::fixed);
    text.remove_prefix(error == std::errc::invalid_argument ? 1 : static_cast<std::size_t>(end - text.data()));
    return fraction;
}

std::expected<std::uint64_t, Mistake> size_of(std::string_view text) {
    int base = 10;
    const auto whole = take_number(text, base);
    if (!whole) return whole;
    const double fraction = base == 10 ? take_fraction(text) : 0;
    unsigned shift = 0;
    if (!text.empty()) {
        constexpr std::string_view suffixes = "bkmgtpe";
        const auto suffix = suffixes.find(static_cast<char>(std::tolower(static_cast<unsigned char>(text[0]))));
        if (text.size() > 1 || suffix == std::string_view::npos) return std::unexpected(Mistake::not_a_number);
        shift = 10 * static_cast<unsigned>(suffix);
    }
    if (shift == 0 && fraction > 0) return std::unexpected(Mistake::not_a_number);
    if (*whole > largest_size >> shift) return std::unexpected(Mistake::too_large);
    const auto part = std::llround(std::ldexp(fraction, static_cast<int>(shift)));
    const auto size = (*whole << shift) + static_cast<std::uint64_t>(part);
    if (size > largest_size) return std::unexpected(Mistake::too_large);
    return size;
}

/// "a, b or c"
std::string listed(const std::vector<std::string>& words) {
    std::string text;
    for (std::size_t i = 0; i < words.size(); ++i)
        text += (i == 0 ? "" : i + 1 == words.size() ? " or " : ", ") + words[i];
    return text;
}

}  // namespace

const CLI::Validator size_text(
    [](std::string& text) -> std::string {
        const auto size = size_of(text);
        if (size) return {};
        if (size.error() == Mistake::too_large) return fmt::format("\"{}\" is too large: sizes are below 8E", text);
        return fmt::format(
            "\"{}\" is not a size: write bytes (4096, 0x1000) or a number with k, M, G, T, P or E (64k, 1.5G)", text);
    },
    "");

std::uint64_t parse_size(const std::string& text) { return size_of(text).value(); }

const CLI::Validator name_text([](std::string& text) { return text.empty() ? "the name is empty" : std::string(); },
                               "");

CLI::Validator whole_number(std::uint64_t least, std::uint64_t most) {
    return {[least, most](std::string& text) -> std::string {
                std::string_view rest = text;
                int base = 10;
                const auto number = take_number(rest, base);
                if (number && rest.empty() && *number >= least && *number <= most) return {};
                return fmt::format("\"{}\" is not a whole number from {} to {}", text, least, most);
            },
            ""};
}

CLI::Option* one_of(CLI::Option* option, std::vector<std::string> words) {
    option->type_name(fmt::format("{{{}}}", fmt::join(words, ",")));
    return option->check(CLI::Validator(
        [words = std::move(words)](std::string& text) {
            return std::ranges::find(words, text) != words.end() ? std::string() : not_one_of(text, words);
        },
        ""));
}

std::string not_one_of(std::string_view text, const std::vector<std::string>& words) {
    const auto instead = qemu_value(text);
    return fmt::format("\"{}\" is not {}{}", text, listed(words),
                       instead ? fmt::format("; {}", *instead) : did_you_mean(text, words));
}

}  // namespace tool
