#pragma once
// The texts that arguments may be: sizes, names, numbers, words of a list.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

/// The largest that a file or disk can have.
inline constexpr std::uint64_t largest_size = std::numeric_limits<std::int64_t>::max();

/// A validator for sizes and offsets as QEMU takes them: bytes, decimal or hexadecimal, or a number with a suffix b, k,
/// M, G, T, P or E (powers of 1024). With a suffix above b, fractions are allowed, and rounded to whole bytes. At
/// most `largest_size`.
extern const CLI::Validator size_text;

/// The value of a text that `size_text` has let through.
std::uint64_t parse_size(const std::string& text);

/// A validator for names of files, snapshots and so on: whatever is not empty.
extern const CLI::Validator name_text;

/// A validator for whole numbers, decimal or hexadecimal, from `least` to `most`.
CLI::Validator whole_number(std::uint64_t least, std::uint64_t most);

/// Lets the option be one of these words alone, and shows them in its help.
CLI::Option* one_of(CLI::Option* option, std::vector<std::string> words);

/// Says that `text` is none of `words`, which one may have been meant, and what does the job of one that QEMU has.
std::string not_one_of(std::string_view text, const std::vector<std::string>& words);

}  // namespace tool
