#pragma once
// Which files a job reads and writes, so that it overwrites none that it also uses otherwise.

#include <cstdint>
#include <map>
#include <string>

#include "qcow/error.h"
#include "qcow/export.h"

namespace qcow {

class Image;
struct ImageSpec;

/// The files of one job, each with its role. A file may be read in several roles. One that is written has only that
/// role, or a second use would find its contents gone. Files are told apart by what they are (device and inode), not by
/// their names, so that links and other spellings do not matter, and without locks. Every job that makes or changes a
/// file adds all files of the job before it changes any. Not thread-safe.
///
/// Each function fails with Errc::invalid_argument, and names both roles, where a file has an excluding role already.
class QCOW_API FilesInUse {
public:
    enum class Use : std::uint8_t { read, written };

    /// One file. `role` is a noun for messages, such as "the target". The file need not exist: it is then the name in
    /// its directory that is used. What is neither a regular file nor a block device is left out.
    Result<void> add(Use use, const std::string& path, const std::string& role);

    /// The files of an open image, and of the layers below it. The layers below are read.
    Result<void> add(Use use, const Image& image, const std::string& role);

    /// The files of an image that was opened by `spec`. What its header names is among them, although `spec` has
    /// something else read in its place.
    Result<void> add(Use use, const Image& image, const ImageSpec& spec, const std::string& role);

    /// The same for an image that is not open: what it and the layers below it name, as far as that can be followed. It
    /// takes no locks, and it is no error that something cannot be opened. Of `spec` only the location and `untrusted`
    /// matter.
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
