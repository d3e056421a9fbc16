#pragma once
// Location: where the bytes of an image lie. Names that people give and names that images record are parsed into one.

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

/// The kinds of places that hold images. Each kind has one opener.
enum class Scheme : std::uint8_t {
    file,  ///< a regular file or block device of this machine
};

/// Where an image lies, and what its name says about it.
struct Location {
    Scheme scheme = Scheme::file;
    std::string path = {};  ///< for the scheme's opener; the path of a file may be relative
    /// The options of a "json:{...}" description, as text, by key: only those that do not change the contents. The
    /// opener of files ignores them.
    std::map<std::string, std::string> options = {};
    std::optional<Format> format = {};  ///< the image's format, if the name says it
    bool alone = false;                 ///< read the image without its backing file ("backing": null)
    std::string secret = {};            ///< the id of the secret that opens the image ("encrypt.key-secret"), or empty
};

/// Parses a name that a person gives: a path, "file:PATH", or "json:{...}" as QEMU writes it. Any other colon is part
/// of a path, unless "//" follows it. With `image`, a relative path is resolved against the directory of `image`.
///
/// Errors: Errc::unsupported for a scheme without an opener ("nbd://..."), for an option of a description that would
/// change the contents, and for more than 4096 bytes; Errc::invalid_argument for a name that cannot be parsed.
/// Thread safety: may be called from any number of threads.
QCOW_API Result<Location> parse_location(std::string_view name, std::string_view image = {});

/// Returns the name that an image must record, for a name that a person gives. Programs then find the same file: a path
/// whose colon looks like the end of a scheme gets "./" in front; a relative path behind "file:" is recorded without
/// it, because QEMU would not start at the image's directory. For a data file, pass Location::path, since QEMU
/// parses no scheme in that name.
/// Thread safety: may be called from any number of threads.
QCOW_API Result<std::string> recorded_name(std::string_view name);

/// Opens the storage at a location, with the opener of its scheme. Errors: those of the opener: see open_file.
/// Thread safety: may be called from any number of threads.
QCOW_API Result<std::shared_ptr<Storage>> open_storage(const Location& location, const FileOptions& options);

}  // namespace qcow
