#include "storage/directory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <cerrno>

namespace qcow {
namespace {

int openat2(int directory, const char* path, int flags, std::uint64_t resolve) {
    open_how how = {};
    how.flags = static_cast<std::uint64_t>(flags);
    how.resolve = resolve;
    return static_cast<int>(syscall(SYS_openat2, directory, path, &how, sizeof how));
}

std::unexpected<Error> refuse(const std::string& name, std::string_view why) {
    return fail(Errc::refused_by_policy, name, std::string(why));
}

}  // namespace

// Also the directory itself by openat2, so that it is known whether there is such a call.
Directory::Directory(const std::string& path)
    : path_(path.empty() ? "." : path),
      fd_(openat2(AT_FDCWD, path_.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC, 0)),
      error_(fd_.get() < 0 ? errno : 0) {}

Result<std::shared_ptr<Storage>> Directory::open_file(const std::string& location, const std::string& name,
                                                      const FileOptions& options) const {
    // EPERM is what some containers say to calls that they do not know.
    if (error_ == ENOSYS || error_ == EPERM) {
        return fail(Errc::unsupported, path_,
                    "this system has no openat2 (Linux 5.6), without which it is not certain what lies beneath a "
                    "directory");
    }
    if (error_ != 0) return system_error("cannot open", path_, error_);
    const auto verify_regular = [&](const FileDescriptor& fd) -> Result<void> {
        struct stat status = {};
        if (fstat(fd.get(), &status) != 0) return system_error("cannot open", name, errno);
        if (!S_ISREG(status.st_mode)) return refuse(name, "is not a regular file, and nothing else may be opened");
        return {};
    };
    // To open a device or a FIFO may have effects already, so it is looked at before, and after, as it may have
    // changed.
    TRY_VOID(verify_regular(TRY(open_beneath(location, name, O_PATH | O_CLOEXEC))));
    auto fd = TRY(open_beneath(location, name, open_flags(options)));
    TRY_VOID(verify_regular(fd));
    return file_storage(std::move(fd), name, options);
}

Result<FileDescriptor> Directory::open_beneath(const std::string& location, const std::string& name, int flags) const {
    constexpr int max_tries = 100;
    for (int i = 0;; ++i) {
        FileDescriptor fd(openat2(fd_.get(), location.c_str(), flags, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS));
        if (fd.get() >= 0) return fd;
        if ((errno == EAGAIN || errno == EINTR) && i < max_tries) continue;  // something on the way was just renamed
        if (errno == EXDEV) {
            return refuse(name,
                          fmt::format("lies outside of the directory \"{}\", and nothing else may be opened", path_));
        }
        return open_error(name, errno, flags);
    }
}

}  // namespace qcow
