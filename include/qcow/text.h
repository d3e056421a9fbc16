#pragma once
// Turns bytes of images into text that is safe to print.

#include <cstddef>
#include <string>
#include <string_view>

#include "qcow/export.h"

namespace qcow {

/// Returns `text` as one line of valid UTF-8. Invalid bytes, control characters and overrides of the direction of
/// writing become "\xNN", so a hostile name cannot control a terminal. The result is cut off after at most `max_bytes`,
/// and "..." is added if something is missing.
QCOW_API std::string printable(std::string_view text, std::size_t max_bytes = std::string_view::npos);

}  // namespace qcow
