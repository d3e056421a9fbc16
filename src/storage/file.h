#pragma once
// Files of the operating system: what those who make Storages of them share.

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "base/try.h"
#include "qcow/storage.h"

namespace qcow {

/// Owns an open file; -1 is none.
class FileDescriptor {
public:
    explicit FileDescriptor(int fd) : fd_(fd) {}
    FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    FileDescriptor& operator=(FileDescriptor&&) = delete;
    ~FileDescriptor() { reset(-1); }
    void reset(int fd) {
        if (fd_ >= 0) close(fd_);
        fd_ = fd;
    }
    [[nodiscard]] int get() const { return fd_; }
    /// Gives up the ownership.
    [[nodiscard]] int release() { return std::exchange(fd_, -1); }

private:
    int fd_;
};

/// "path: action: what the system says", with the code that `error` (an errno) amounts to.
std::unexpected<Error> system_error(std::string_view action, const std::string& path, int error);

/// See Storage::identity.
std::string identity_of(const struct stat& status);

/// Where a symbolic link leads, if anywhere yet; every other path as it is.
std::filesystem::path link_target(std::filesystem::path path);

/// How open(2) is to open a file. Nothing is waited for: a FIFO is there to be refused.
int open_flags(const FileOptions& options);

/// What it means that open(2) gave `error` for these flags.
std::unexpected<Error> open_error(const std::string& path, int error, int flags);

/// A Storage on a file that was opened as the options say, which must be a regular file or a block device. `path` names
/// it in messages.
Result<std::shared_ptr<Storage>> file_storage(FileDescriptor fd, const std::string& path, const FileOptions& options);

}  // namespace qcow
