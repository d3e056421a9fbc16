#include "filesystem/archive_entry.h"

#include <algorithm>

#include "filesystem/readers.h"

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

std::optional<Timestamp> mtime_of_entry(archive* reader, archive_entry* entry) {
    if (archive_entry_mtime_is_set(entry) == 0) return {};
    return time_of(reader, archive_entry_mtime(entry), archive_entry_mtime_nsec(entry));
}
std::optional<Timestamp> atime_of_entry(archive* reader, archive_entry* entry) {
    if (archive_entry_atime_is_set(entry) == 0) return {};
    return time_of(reader, archive_entry_atime(entry), archive_entry_atime_nsec(entry));
}

}  // namespace qcow
