#pragma once
// Location: where the bytes of an image lie. What people write and what images record is parsed into one, once.

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "qcow/error.h"
#include "qcow/export.h"
#include "qcow/format.h"

namespace qcow {

class Storage;
struct FileOptions;

/// The kinds of places that hold images. Each has one opener.
enum class Scheme : std::uint8_t {
    file,  ///< a regular file or block device of this machine
};

/// Where an image lies, and what its name says about it.
struct Location {
    Scheme scheme = Scheme::file;
    std::string path = {};  ///< what the scheme's opener looks for; a file's may be relative
    /// Options of a "json:{...}" description, as text, by key. Only those are let in that do not change the bytes. The
    /// opener of files ignores them.
    std::map<std::string, std::string> options = {};
    std::optional<Format> format = {};  ///< of the image, where the name says it
    bool alone = false;                 ///< the image is to be read without its backing file ("backing": null)
};

/// Parses a name that a person gives: a path, "file:PATH", or "json:{...}" as QEMU writes it. A colon of any other kind
/// is part of a path. With `image`, the name is what the image of that path is to record: a relative path is then
/// resolved against the directory of `image`.
///
/// Errors: Errc::unsupported for a scheme that has no opener ("nbd://..."), and for an option of a description that
/// would change the contents; Errc::invalid_argument for what cannot be understood. Thread-safe.
QCOW_API Result<Location> parse_location(std::string_view name, std::string_view image = {});

/// Returns how an image has to record a name that a person gives, so that programs find the same file by it. A path
/// whose colon would be taken for that of a scheme gets "./" in front. The name of a data file has to be a path, since
/// QEMU parses no scheme there: pass Location::path for it. Thread-safe.
QCOW_API Result<std::string> recorded_name(std::string_view name);

/// Opens the storage at a location, with the opener of its scheme. Errors: those of the opener; for files see
/// open_file. Thread-safe.
QCOW_API Result<std::shared_ptr<Storage>> open_storage(const Location& location, const FileOptions& options);

}  // namespace qcow
