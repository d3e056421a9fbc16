#include "filesystem/archive_entry.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "base/try.h"
#include "filesystem/little_endian.h"
#include "filesystem/readers.h"
#include "qcow/text.h"

namespace qcow {
namespace {

constexpr std::uint32_t second = 1'000'000'000;  // nanoseconds

std::string text_of(const char* utf8, const char* bytes) {
    if (utf8 != nullptr) return utf8;
    return bytes == nullptr ? std::string() : bytes;
}

/// pax has times as decimal numbers. libarchive gives the digits behind the point as nanoseconds, and does not see that
/// they belong to a negative number.
Timestamp time_of(archive* reader, std::int64_t seconds, long nanoseconds) {
    Timestamp time{seconds, static_cast<std::uint32_t>(std::clamp<long>(nanoseconds, 0, second - 1))};
    const bool decimal = (archive_format(reader) & ARCHIVE_FORMAT_BASE_MASK) == ARCHIVE_FORMAT_TAR;
    if (decimal && seconds < 0 && time.nanoseconds != 0 && seconds != INT64_MIN)
        time = {seconds - 1, second - time.nanoseconds};
    return time;
}

locale_t utf8_locale() {
    static const locale_t made = newlocale(LC_CTYPE_MASK, "C.UTF-8", nullptr);
    return made;
}

}  // namespace

void load_archive_locale() { static_cast<void>(utf8_locale()); }

Utf8Locale::Utf8Locale(bool wanted) {
    if (wanted && utf8_locale() != nullptr) before_ = uselocale(utf8_locale());
}
Utf8Locale::~Utf8Locale() {
    if (before_ != nullptr) uselocale(before_);
}

std::string path_of_entry(archive_entry* entry) {
    return text_of(archive_entry_pathname_utf8(entry), archive_entry_pathname(entry));
}
std::string hard_link_of_entry(archive_entry* entry) {
    return text_of(archive_entry_hardlink_utf8(entry), archive_entry_hardlink(entry));
}
std::string target_of_entry(archive_entry* entry) {
    return text_of(archive_entry_symlink_utf8(entry), archive_entry_symlink(entry));
}

std::uint32_t mode_of_entry(archive_entry* entry) {
    std::uint32_t mode = archive_entry_mode(entry);
    if (archive_entry_acl_reset(entry, ARCHIVE_ENTRY_ACL_TYPE_ACCESS) <= 3) return mode;
    int type = 0;
    int permissions = 0;
    int tag = 0;
    int id = 0;
    const char* name = nullptr;
    while (archive_entry_acl_next(entry, ARCHIVE_ENTRY_ACL_TYPE_ACCESS, &type, &permissions, &tag, &id, &name) ==
           ARCHIVE_OK) {
        if (tag == ARCHIVE_ENTRY_ACL_MASK) mode = (mode & ~070U) | static_cast<std::uint32_t>(permissions & 7) << 3;
    }
    return mode;
}

namespace {

struct AclEntry {
    std::uint16_t tag = 0;
    std::uint16_t permissions = 0;
    std::uint32_t id = 0xffffffff;  // none
};

constexpr std::uint16_t named_user = 2;
constexpr std::uint16_t named_group = 8;

/// The tag of Linux; 0: Linux has no such entries.
std::uint16_t tag_of_acl(int tag) {
    switch (tag) {
        case ARCHIVE_ENTRY_ACL_USER_OBJ: return 1;
        case ARCHIVE_ENTRY_ACL_USER: return named_user;
        case ARCHIVE_ENTRY_ACL_GROUP_OBJ: return 4;
        case ARCHIVE_ENTRY_ACL_GROUP: return named_group;
        case ARCHIVE_ENTRY_ACL_MASK: return 16;
        case ARCHIVE_ENTRY_ACL_OTHER: return 32;
        default: return 0;
    }
}

Result<std::vector<AclEntry>> acl_of_entry(archive_entry* entry, int which) {
    std::vector<AclEntry> entries;
    // An ACL of three entries is the permissions.
    if (archive_entry_acl_reset(entry, which) <= (which == ARCHIVE_ENTRY_ACL_TYPE_ACCESS ? 3 : 0)) return entries;
    int type = 0;
    int permissions = 0;
    int tag = 0;
    int id = 0;
    const char* user = nullptr;
    while (archive_entry_acl_next(entry, which, &type, &permissions, &tag, &id, &user) == ARCHIVE_OK) {
        AclEntry made{.tag = tag_of_acl(tag), .permissions = static_cast<std::uint16_t>(permissions & 7)};
        if (made.tag == 0) continue;
        if (made.tag == named_user || made.tag == named_group) {
            if (id < 0) {
                return fail(
                    Errc::unsupported, "",
                    fmt::format(
                        "its ACL names \"{}\" without a number; archive without --acls, or with bsdtar --numeric-owner",
                        printable(user == nullptr ? "" : user, 64)));
            }
            made.id = static_cast<std::uint32_t>(id);
        }
        entries.push_back(made);
    }
    std::ranges::sort(entries, {}, [](const AclEntry& acl) { return std::pair(acl.tag, acl.id); });
    return entries;
}

}  // namespace

Result<std::vector<Attribute>> acls_of_entry(archive_entry* entry) {
    std::vector<Attribute> acls;
    for (const auto& [which, name] : {std::pair(ARCHIVE_ENTRY_ACL_TYPE_ACCESS, "system.posix_acl_access"),
                                      {ARCHIVE_ENTRY_ACL_TYPE_DEFAULT, "system.posix_acl_default"}}) {
        const auto entries = TRY(acl_of_entry(entry, which));
        if (entries.empty()) continue;
        constexpr std::size_t entry_bytes = 8;
        std::vector<std::byte> value(4 + entries.size() * entry_bytes);
        store_le<std::uint32_t>(value, 0, 2);  // version
        for (std::size_t i = 0; i < entries.size(); ++i) {
            store_le(value, 4 + i * entry_bytes, entries[i].tag);
            store_le(value, 6 + i * entry_bytes, entries[i].permissions);
            store_le(value, 8 + i * entry_bytes, entries[i].id);
        }
        acls.push_back({name, std::move(value)});
    }
    return acls;
}

DeviceNumber device_of_entry(archive_entry* entry) {
    const auto fitting = [](std::uint64_t number) {
        return static_cast<std::uint32_t>(std::min<std::uint64_t>(number, std::numeric_limits<std::uint32_t>::max()));
    };
    return {fitting(archive_entry_rdevmajor(entry)), fitting(archive_entry_rdevminor(entry))};
}

std::optional<Timestamp> mtime_of_entry(archive* reader, archive_entry* entry) {
    if (archive_entry_mtime_is_set(entry) == 0) return {};
    return time_of(reader, archive_entry_mtime(entry), archive_entry_mtime_nsec(entry));
}
std::optional<Timestamp> atime_of_entry(archive* reader, archive_entry* entry) {
    if (archive_entry_atime_is_set(entry) == 0) return {};
    return time_of(reader, archive_entry_atime(entry), archive_entry_atime_nsec(entry));
}

}  // namespace qcow
