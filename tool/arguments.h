#pragma once
// Validators for arguments: sizes, names, numbers, words of a list.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

/// The largest size of a file or disk, in bytes.
inline constexpr std::uint64_t largest_size = std::numeric_limits<std::int64_t>::max();

/// A validator for sizes and offsets. Accepts what QEMU accepts: bytes in decimal or hexadecimal, or a number with a
/// suffix b, k, M, G, T, P or E (powers of 1024). With a suffix above b, the number may have a fraction, and the result
/// is rounded to whole bytes. The limit is `largest_size`.
extern const CLI::Validator size_text;

/// Returns the value of a text that `size_text` has accepted.
std::uint64_t parse_size(const std::string& text);

/// A validator for names of files, snapshots and so on. Refuses the empty name.
extern const CLI::Validator name_text;

/// A validator for whole numbers, decimal or hexadecimal, from `least` to `most`.
CLI::Validator whole_number(std::uint64_t least, std::uint64_t most);

/// Restricts the option to these words, and lists them in its help.
CLI::Option* one_of(CLI::Option* option, std::vector<std::string> words);

/// Returns the message that `text` is none of `words`, with the nearest word. If QEMU has a value `text`, the message
/// names what replaces it.
std::string not_one_of(std::string_view text, const std::vector<std::string>& words);

}  // namespace tool
