#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace qcow {

/// The text in UTF-16; nothing if it is no UTF-8.
std::optional<std::u16string> utf16(std::string_view text);

}  // namespace qcow
