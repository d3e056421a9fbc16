#include "storage/file_lock.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "base/try.h"

namespace qcow {
namespace {

struct Permission {
    int number;
    const char* what;
    bool writers_hold;
    bool shared;  // with others, while we use the file
};
// QEMU's numbering. Number 2, writes that change nothing, is left to those who need it.
constexpr std::array permissions = {
    Permission{0, "read", false, true},
    Permission{1, "write", true, false},
    Permission{3, "resize", true, false},
};
constexpr off_t held_base = 100;
constexpr off_t unshared_base = 200;

struct flock region(off_t byte, short type) {
    struct flock lock = {};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    lock.l_start = byte;
    lock.l_len = 1;
    return lock;
}

/// Whether anybody else holds a lock on `byte`.
bool is_locked_by_others(int fd, off_t byte) {
    auto lock = region(byte, F_WRLCK);
    return fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

}  // namespace

Result<void> lock_file(int fd, const std::string& path, bool writable) {
    const auto take = [&](off_t byte) {
        auto lock = region(byte, F_RDLCK);
        return fcntl(fd, F_OFD_SETLK, &lock) == 0 ? 0 : errno;
    };
    const auto conflict = [&](const char* what) {
        return fail(Errc::locked, path,
                    fmt::format("another process is using it (no \"{}\" lock to be had); {}", what,
                                writable ? "stop that process first"
                                         : "stop that process, or read it all the same with -U (--force-share)"));
    };
    for (const auto& p : permissions) {
        for (const auto& [wanted, byte] :
             {std::pair{writable || !p.writers_hold, held_base}, std::pair{!p.shared, unshared_base}}) {
            if (!wanted) continue;
            const int error = take(byte + p.number);
            if (error == EINVAL || error == ENOLCK || error == EOPNOTSUPP || error == ENOSYS)
                return {};  // no locks here
            if (error != 0) return conflict(p.what);
        }
    }
    for (const auto& p : permissions) {
        const bool held = writable || !p.writers_hold;
        if (held && is_locked_by_others(fd, unshared_base + p.number)) return conflict(p.what);
        if (!p.shared && is_locked_by_others(fd, held_base + p.number)) return conflict(p.what);
    }
    return {};
}

}  // namespace qcow
