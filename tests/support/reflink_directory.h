#pragma once
// A directory on a file system that can share extents between files.

#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "support/subprocess.h"
#include "support/temporary_directory.h"

namespace qcow::test {

/// An XFS of 320 MiB in a file, mounted as long as this lives. Only root can have it, where there are loop devices.
class ReflinkDirectory {
public:
    ReflinkDirectory() {
        const auto image = outer_ / "xfs";
        write_file(image, "");
        std::filesystem::resize_file(image, std::uint64_t{320} << 20);
        std::filesystem::create_directory(path());
        if (geteuid() != 0) {
            obstacle_ = "only root can mount";
            return;
        }
        for (const std::vector<std::string>& command :
             {std::vector<std::string>{"mkfs.xfs", "-q", "-m", "reflink=1", image},
              std::vector<std::string>{"mount", "-o", "loop", image, path()}}) {
            try {
                must_run(command);
            } catch (const std::exception& error) {
                obstacle_ = error.what();
                return;
            }
        }
    }
    ReflinkDirectory(const ReflinkDirectory&) = delete;
    ReflinkDirectory& operator=(const ReflinkDirectory&) = delete;
    ~ReflinkDirectory() {
        if (obstacle_.empty()) run({"umount", path()});
    }

    /// Why there is none; empty if there is.
    [[nodiscard]] const std::string& obstacle() const { return obstacle_; }
    [[nodiscard]] std::string path() const { return outer_ / "mounted"; }
    [[nodiscard]] std::string operator/(std::string_view name) const { return path() + "/" + std::string(name); }

private:
    TemporaryDirectory outer_;
    std::string obstacle_;
};

/// How many bytes of a file lie in extents that belong to another file, too.
inline std::uint64_t shared_bytes(const std::string& path) {
    constexpr unsigned max_extents = 4096;
    std::vector<char> memory(sizeof(fiemap) + max_extents * sizeof(fiemap_extent));
    auto& map = *reinterpret_cast<fiemap*>(memory.data());
    map.fm_length = FIEMAP_MAX_OFFSET;
    map.fm_flags = FIEMAP_FLAG_SYNC;
    map.fm_extent_count = max_extents;
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    const bool done = fd >= 0 && ioctl(fd, FS_IOC_FIEMAP, &map) == 0;
    if (fd >= 0) close(fd);
    if (!done) throw std::runtime_error("cannot tell the extents of " + path);
    std::uint64_t sum = 0;
    for (unsigned i = 0; i < map.fm_mapped_extents; ++i) {
        const auto& extent = map.fm_extents[i];
        if ((extent.fe_flags & FIEMAP_EXTENT_SHARED) != 0) sum += extent.fe_length;
    }
    return sum;
}

}  // namespace qcow::test
