#pragma once
// Bytes from images as text that is safe to show.

#include <string>
#include <string_view>

#include "qcow/export.h"

namespace qcow {

/// Valid UTF-8 without control characters: what is neither becomes "\xNN". Keeps hostile names from reaching a
/// terminal, and messages on one line.
QCOW_API std::string printable(std::string_view text);

}  // namespace qcow
