#pragma once
// Properties of an entry of an archive, as libarchive does not give them.

#include <archive.h>
#include <archive_entry.h>
#include <locale.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "qcow/filesystem.h"

namespace qcow {

/// Within its life, the locale of the thread has UTF-8. libarchive converts names of Unicode to the characters of the
/// locale, and those of "C" are too few.
class Utf8Locale {
public:
    /// If `wanted` is false, the locale stays.
    explicit Utf8Locale(bool wanted);
    Utf8Locale(const Utf8Locale&) = delete;
    Utf8Locale& operator=(const Utf8Locale&) = delete;
    ~Utf8Locale();

private:
    locale_t before_ = nullptr;
};

// Names are bytes here. Those that the archive knows as Unicode are UTF-8, whatever the locale.
std::string path_of_entry(archive_entry* entry);
std::string hard_link_of_entry(archive_entry* entry);  // empty: none
std::string target_of_entry(archive_entry* entry);     // of a symbolic link; empty: none

/// The type and the permissions. With an ACL, the permissions of the group are the mask, as Linux has them.
std::uint32_t mode_of_entry(archive_entry* entry);

/// The ACLs, as the extended attributes that Linux keeps them in (linux/posix_acl_xattr.h). Errors: Errc::unsupported:
/// an ACL names a user without a number.
Result<std::vector<Attribute>> acls_of_entry(archive_entry* entry);

struct DeviceNumber {
    std::uint32_t major = 0;
    std::uint32_t minor = 0;
};
/// A number of more than 32 bits becomes the greatest one.
DeviceNumber device_of_entry(archive_entry* entry);

std::optional<Timestamp> mtime_of_entry(archive* reader, archive_entry* entry);
std::optional<Timestamp> atime_of_entry(archive* reader, archive_entry* entry);

}  // namespace qcow
