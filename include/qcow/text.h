#pragma once
// Bytes from images as text that is safe to show.

#include <cstddef>
#include <string>
#include <string_view>

#include "qcow/export.h"

namespace qcow {

/// Valid UTF-8 without control characters and overrides of the direction of writing: what is neither becomes "\xNN".
/// Keeps hostile names from reaching a terminal, and messages on one line. Where the result would be longer than
/// `max_bytes`, the end is left out, and "..." behind the rest says so.
QCOW_API std::string printable(std::string_view text, std::size_t max_bytes = std::string_view::npos);

}  // namespace qcow
