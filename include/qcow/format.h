#pragma once
// The formats of images, and their names.

#include <cstdint>
#include <optional>
#include <string_view>

#include "qcow/export.h"

namespace qcow {

enum class Format : std::uint8_t { raw, qcow, qcow2 };

/// "raw", "qcow" (version 1), "qcow2" (versions 2 and 3), as in headers and on QEMU's command lines.
QCOW_API std::string_view format_name(Format format);

/// The format that has this name. Returns nothing for any other name.
QCOW_API std::optional<Format> format_from_name(std::string_view name);

}  // namespace qcow
