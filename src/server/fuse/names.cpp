#include "server/fuse/names.h"

#include <fmt/format.h>

#include <climits>

#include "qcow/mount.h"
#include "qcow/text.h"

namespace qcow {
namespace {

/// Returns the text as part of a file name, without slashes and control characters.
std::string encoded(const std::string& text, std::size_t length_before) {
    const bool is_text = printable(text) == text;
    std::string name;
    for (const char c : text) {
        const bool plain = is_text || (c >= 0x20 && c < 0x7f);
        const bool leads = name.empty() && length_before == 0 && c == '.';
        if (plain && c != '/' && c != '%' && !leads) {
            name += c;
        } else {
            name += fmt::format("%{:02X}", static_cast<unsigned char>(c));
        }
    }
    return name.size() + length_before <= NAME_MAX ? name : std::string();
}

}  // namespace

std::string snapshot_file_name(const std::string& snapshot) { return encoded(snapshot, 0); }

std::string fuse::id_file_name(const std::string& id) {
    static constexpr std::string_view prefix = "%id=";  // no encoded name begins like this
    const auto name = encoded(id, prefix.size());
    return name.empty() ? name : std::string(prefix) + name;
}

}  // namespace qcow
