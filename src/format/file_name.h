#pragma once
// The names that images give to other files: a path, "file:PATH", or a "json:{...}" description as QEMU writes them.

#include <optional>
#include <string>
#include <string_view>

#include "qcow/error.h"
#include "qcow/image.h"

namespace qcow::format {

struct FileName {
    std::string path;              // as given: may be relative
    std::optional<Format> format;  // where a description says so
};

/// Errc::unsupported for names of anything but a local file, Errc::corrupt for what cannot be parsed. An option in a
/// description that would change the contents is refused by name.
Result<FileName> parse_file_name(std::string_view name);

/// Whether it is a "json:" description.
bool is_description(std::string_view name);

/// `path` as seen from the directory of the file `from`; absolute paths stay.
std::string resolve(std::string_view path, std::string_view from);

}  // namespace qcow::format
