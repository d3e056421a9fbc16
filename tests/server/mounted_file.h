#pragma once
// What programs do with a file of a mount.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#include "storage/file.h"

namespace qcow::test {

class OpenFile {
public:
    explicit OpenFile(const std::string& path, int flags = O_RDWR) : fd_(open(path.c_str(), flags | O_CLOEXEC)) {
        if (fd_.get() < 0) throw std::runtime_error(path + ": " + std::strerror(errno));
    }
    [[nodiscard]] int fd() const { return fd_.get(); }

    [[nodiscard]] std::string read(std::uint64_t at, std::size_t length) const {
        std::string bytes(length, '?');
        const auto count = pread(fd(), bytes.data(), length, static_cast<off_t>(at));
        if (count < 0) throw std::runtime_error(std::strerror(errno));
        bytes.resize(static_cast<std::size_t>(count));
        return bytes;
    }
    /// Returns the bytes written, or minus the errno.
    [[nodiscard]] ssize_t write(std::uint64_t at, const std::string& bytes) const {
        const auto count = pwrite(fd(), bytes.data(), bytes.size(), static_cast<off_t>(at));
        return count < 0 ? -errno : count;
    }
    [[nodiscard]] int allocate(int mode, off_t at, off_t length) const {
        return fallocate(fd(), mode, at, length) == 0 ? 0 : errno;
    }

private:
    FileDescriptor fd_;
};

int errno_of_open(const std::string& path, int flags);

/// Skips where nothing can be mounted.
class MountTest : public testing::Test {
protected:
    void SetUp() override;
};

}  // namespace qcow::test
