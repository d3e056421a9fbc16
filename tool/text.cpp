#include "text.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>

namespace tool {
namespace {

/// Of a column. A longer cell sticks out, so that one long name does not fill all other rows with blanks.
constexpr std::size_t max_width = 64;

}  // namespace

std::string human(std::uint64_t bytes) {
    constexpr std::array units = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    if (bytes == 1) return "1 byte";
    auto value = static_cast<double>(bytes);
    std::size_t unit = 0;
    while (value >= 999.5 && unit + 1 < units.size()) value /= 1024, ++unit;
    if (unit != 0 && value < 99.95 && static_cast<double>(static_cast<std::uint64_t>(value)) != value) {
        return fmt::format("{:.{}f} {}", value, value < 9.995 ? 2 : 1, units[unit]);
    }
    return fmt::format("{:.0f} {}", value, units[unit]);
}

std::string human_exact(std::uint64_t bytes) {
    return bytes < 1000 ? human(bytes) : fmt::format("{} ({} bytes)", human(bytes), bytes);
}

std::string base64(std::string_view bytes) {
    constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string text;
    for (std::size_t at = 0; at < bytes.size(); at += 3) {
        const auto group = bytes.substr(at, 3);
        std::uint32_t bits = 0;
        for (std::size_t i = 0; i < 3; ++i)
            bits = bits << 8 | (i < group.size() ? static_cast<std::uint8_t>(group[i]) : 0U);
        for (std::size_t i = 0; i < 4; ++i) text += i > group.size() ? '=' : digits[bits >> (18 - 6 * i) & 63];
    }
    return text;
}

std::string paint(std::string_view text, Colour colour) {
    static const bool wanted = isatty(STDOUT_FILENO) != 0 && std::getenv("NO_COLOR") == nullptr;
    constexpr std::array codes = {"", "1", "2", "31", "32", "33"};
    if (!wanted || colour == Colour::none) return std::string(text);
    return fmt::format("\x1b[{}m{}\x1b[0m", codes[static_cast<std::size_t>(colour)], text);
}

void Table::print() const {
    std::vector<std::size_t> widths;
    for (std::size_t i = 0; i < columns_.size(); ++i) {
        std::size_t width = columns_[i].title.size();
        for (const auto& row : rows_) width = std::max(width, row[i].size());
        widths.push_back(std::min(width, max_width));
    }
    const auto line = [&](const auto& cell_at, Colour colour) {
        std::string text;
        for (std::size_t i = 0; i < columns_.size(); ++i) {
            const std::string& cell = cell_at(i);
            const bool last = i + 1 == columns_.size();
            if (columns_[i].align == Align::right) {
                text += fmt::format("{:>{}}", cell, widths[i]);
            } else {
                text += last ? cell : fmt::format("{:<{}}", cell, widths[i]);
            }
            if (!last) text += "  ";
        }
        fmt::print("{}\n", paint(text, colour));
    };
    line([&](std::size_t i) -> const std::string& { return columns_[i].title; }, Colour::bold);
    for (const auto& row : rows_) line([&](std::size_t i) -> const std::string& { return row[i]; }, Colour::none);
}

}  // namespace tool
