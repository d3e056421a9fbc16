#pragma once
// Image formats and their names.

#include <cstdint>
#include <optional>
#include <string_view>

#include "qcow/export.h"

namespace qcow {

/// luks: an encrypted disk by itself, version 1 or 2.
enum class Format : std::uint8_t { raw, qcow, qcow2, luks };

/// Returns "raw", "qcow" (version 1), "qcow2" (versions 2 and 3) or "luks": the names that headers and QEMU use.
QCOW_API std::string_view format_name(Format format);

/// Returns the format with this name, or nothing.
QCOW_API std::optional<Format> format_from_name(std::string_view name);

}  // namespace qcow
