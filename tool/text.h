#pragma once
// Text for people: sizes, colours, tables.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "qcow/text.h"

namespace tool {

/// "64 KiB", "1.5 GiB": at most three significant digits.
std::string human(std::uint64_t bytes);

/// "1.5 GiB (1610612736 bytes)"; below 1000 bytes, without the brackets.
std::string human_exact(std::uint64_t bytes);

/// The bytes in base64 (RFC 4648).
std::string base64(std::string_view bytes);

using qcow::did_you_mean;

enum class Colour { none, bold, dim, red, green, yellow };
/// Returns the text in a colour if standard output is a terminal and NO_COLOR is not set.
std::string paint(std::string_view text, Colour colour);

/// A table of text. Columns are as wide as their contents, but at most 64 bytes; longer cells stick out. The header
/// line is bold on a terminal.
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
    /// Prints the table to standard output.
    void print() const;

private:
    std::vector<Column> columns_;
    std::vector<std::vector<std::string>> rows_;
};

}  // namespace tool
