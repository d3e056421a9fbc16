#pragma once
// The files that a job reads and writes. Keeps a job from overwriting a file that it also uses otherwise.

#include <cstdint>
#include <map>
#include <string>

#include "qcow/error.h"
#include "qcow/export.h"

namespace qcow {

class Image;
struct ImageSpec;

/// The files of one job, each with its role. A file may be read in several roles. A file that is written has that one
/// role only. Files are identified by device and inode, so links and spellings do not matter. No locks are taken. A job
/// adds all of its files before it changes any.
///
/// Errors of each function: Errc::invalid_argument if the file has a role that excludes the new one. The message names
/// both roles.
/// Thread safety: none.
class QCOW_API FilesInUse {
public:
    enum class Use : std::uint8_t { read, written };

    /// Adds one file. `role` is a noun for messages, such as "the target". A file that does not exist is identified by
    /// its directory and name. Ignores what is neither a regular file nor a block device.
    Result<void> add(Use use, const std::string& path, const std::string& role);

    /// Adds the files of an open image with `use`, and those of the layers below it as read.
    Result<void> add(Use use, const Image& image, const std::string& role);

    /// Adds the files of an image that was opened by `spec`. Also adds the backing chain that its header names if
    /// `spec` replaces that or leaves it out.
    Result<void> add(Use use, const Image& image, const ImageSpec& spec, const std::string& role);

    /// Adds the files of an image that is not open, and those that it and the layers below it name, as far as they can
    /// be opened. A file that cannot be opened is no error. Uses only `location` and `untrusted` of `spec`.
    Result<void> add_unopened(Use use, const ImageSpec& spec, const std::string& role);

private:
    struct File {
        Use use = Use::read;
        std::string path;
        std::string role;
    };
    std::map<std::string, File> files_;  // by identity
};

}  // namespace qcow
