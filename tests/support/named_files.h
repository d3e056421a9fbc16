#pragma once
// Everything that an image from a stranger may name, and what is to become of it.

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include "qcow/create.h"
#include "support/disks.h"
#include "support/temporary_directory.h"

namespace qcow::test {

inline constexpr std::size_t named_size = 65536;

/// Whether a file is opened, for trusted images and for untrusted ones; if not, why.
enum class Granted { yes, no_regular_file, leads_out, absolute, described, scheme, missing };

struct NamedFile {
    std::string name;  // as the image has it
    Granted trusted = Granted::yes;
    Granted untrusted = Granted::yes;
};

/// A directory for images, with files of every kind in and around it.
class NamedFiles {
public:
    NamedFiles();

    /// Gives all that can be written the contents that it had.
    void reset() const;

    [[nodiscard]] bool is_outside_untouched() const { return file_bytes(outside()) == std::string(named_size, 'o'); }

    [[nodiscard]] std::filesystem::path images() const { return directory_.path() / "images"; }
    [[nodiscard]] std::filesystem::path outside() const { return directory_.path() / "outside"; }

    [[nodiscard]] std::vector<NamedFile> all() const;

    /// Writes an image into the directory that names a backing file (raw) or a data file, and nothing else.
    std::string make_image(const std::string& file, FileReference::Role role, const std::string& name,
                           const std::string& format = "raw") const;

private:
    TemporaryDirectory directory_;
    bool has_device_ = false;
};

}  // namespace qcow::test
