#pragma once
// Text for people: sizes, colours, tables.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

/// "64 KiB", "1.5 GiB": at most three significant digits.
std::string human(std::uint64_t bytes);

/// "1.5 GiB (1610612736 bytes)"; exact multiples and small numbers without the brackets.
std::string human_exact(std::uint64_t bytes);

/// `; did you mean "WORD"?`, with the one of `words` that is close enough to `text`: few letters differ, or one of the
/// two is the beginning of the other. Empty where none is.
std::string did_you_mean(std::string_view text, const std::vector<std::string>& words);

enum class Colour { none, bold, dim, red, green, yellow };
/// The text in a colour, if standard output is a terminal that wants any.
std::string paint(std::string_view text, Colour colour);

/// Columns of text, as wide as their contents, but for cells of more than 64 bytes, which stick out. The header line is
/// bold on a terminal.
class Table {
public:
    enum class Align { left, right };
    struct Column {
        std::string title;
        Align align = Align::left;
    };
    explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}
    void add(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }
    [[nodiscard]] bool empty() const { return rows_.empty(); }
    /// To standard output.
    void print() const;

private:
    std::vector<Column> columns_;
    std::vector<std::vector<std::string>> rows_;
};

}  // namespace tool
