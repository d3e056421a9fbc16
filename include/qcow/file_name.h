#pragma once
// The names by which people and images call files: a path, "file:PATH", or "json:{...}" as QEMU writes them.

#include <optional>
#include <string>
#include <string_view>

#include "qcow/image.h"

namespace qcow {

/// What a name comes to.
struct FileName {
    std::string path;                   ///< for open_file
    std::optional<Format> format = {};  ///< where the name says so, for OpenOptions::format
    bool alone = false;                 ///< "backing": null, for OpenOptions::backing
};

/// A name that a person gives. A colon of any other kind is part of a path. With `image`, the name is what the image of
/// that path is to call another file, so that a relative one is seen from its directory. Errc::unsupported for what is
/// no local file ("nbd://...") and for an option of a description that would change the contents;
/// Errc::invalid_argument for what cannot be understood.
QCOW_API Result<FileName> parse_file_name(std::string_view name, std::string_view image = {});

/// How an image has to record a name that a person gives, so that the same file is found by it: "./" goes in front of a
/// path whose colon would be taken for that of a scheme. For a data file give it the path, as QEMU takes what is
/// recorded of that for one.
QCOW_API std::string recorded_file_name(std::string_view name);

}  // namespace qcow
