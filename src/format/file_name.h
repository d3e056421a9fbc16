#pragma once
// The names that images give to other files: a path, "file:PATH", or a "json:{...}" description as QEMU writes them.

#include <string>
#include <string_view>

#include "qcow/image.h"

namespace qcow::format {

/// The path is as given: it may be relative. Errc::unsupported for a scheme that has no opener, Errc::corrupt for what
/// cannot be parsed. An option in a description that would change the contents is refused by name. In the name of a
/// data file QEMU knows no schemes, so that a colon is part of the path there, unless it stands before "//".
Result<Location> parse_file_name(std::string_view name, FileReference::Role role = FileReference::Role::backing_file);

/// Whether it is a "json:" description.
bool is_description(std::string_view name);

/// Whether it looks like a path of Windows: with a drive letter, or with backslashes only.
bool is_windows_path(std::string_view name);

/// `path` as seen from the directory of the file `from`; absolute paths stay.
std::string resolve(std::string_view path, std::string_view from);

/// A word of a command line for a shell, as the user is to type it.
std::string shell_word(std::string_view word);

}  // namespace qcow::format
