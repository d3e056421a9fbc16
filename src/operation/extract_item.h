#pragma once
// What errors call a file that is extracted.

#include <string>

#include "qcow/filesystem.h"

namespace qcow {

/// `path` is relative to the item.
inline std::string shown_path(const ExtractItem& item, const std::string& path) {
    if (item.shown.empty() || path.empty()) return item.shown + path;
    return item.shown + (item.shown.ends_with('/') ? "" : "/") + path;
}

}  // namespace qcow
