#pragma once
// Turns bytes of images into text that is safe to print.

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "qcow/export.h"

namespace qcow {

/// Returns `text` as one line of valid UTF-8. Invalid bytes, control characters and overrides of the direction of
/// writing become "\xNN", so a hostile name cannot control a terminal. The result is cut off after at most `max_bytes`,
/// and "..." is added if something is missing.
QCOW_API std::string printable(std::string_view text, std::size_t max_bytes = std::string_view::npos);

/// Returns the bytes that printable() shows as `text`: "\xNN" becomes the byte, and all else stays.
QCOW_API std::string unprintable(std::string_view text);

/// Whether `text` is valid UTF-8.
QCOW_API bool is_utf8(std::string_view text);

/// Returns `; did you mean "WORD"?` with the word that is nearest to `text`: at most a third of the letters differ, or
/// `text` is the start of the word (three letters or more). Returns an empty string if no word is near enough.
QCOW_API std::string did_you_mean(std::string_view text, const std::vector<std::string>& words);

}  // namespace qcow
