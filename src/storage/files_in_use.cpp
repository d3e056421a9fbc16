#include "qcow/files_in_use.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <optional>

#include "base/within_memory.h"
#include "storage/file.h"

namespace qcow {
namespace {

/// What `path` is, whatever its spelling; nothing for what cannot be a file of a job.
std::optional<std::string> identity_at(const std::string& path) {
    struct stat status = {};
    if (stat(path.c_str(), &status) == 0) {
        if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode)) return std::nullopt;
        return identity_of(status);
    }
    const auto target = link_target(path);
    const auto directory = target.has_parent_path() ? target.parent_path() : std::filesystem::path(".");
    if (stat(directory.c_str(), &status) != 0) return std::nullopt;
    return fmt::format("{}/{}", identity_of(status), target.filename().string());
}

}  // namespace

Result<void> FilesInUse::add(Use use, const std::string& path, const std::string& role) {
    return within_memory([&]() -> Result<void> {
        const auto identity = identity_at(path);
        if (!identity) return {};
        const auto [found, is_new] = files_.try_emplace(*identity, File{use, path, role});
        const auto& other = found->second;
        if (is_new || (use == Use::read && other.use == Use::read)) return {};
        const bool overwrites = use == Use::written;
        return fail(Errc::invalid_argument, path,
                    fmt::format("{} would overwrite {}{}; choose another file", overwrites ? role : other.role,
                                overwrites ? other.role : role,
                                other.path == path ? "" : fmt::format(" (\"{}\" is the same file)", other.path)));
    });
}

}  // namespace qcow
