#pragma once
// A block device, in a file.

#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>

#include "support/subprocess.h"
#include "support/temporary_directory.h"

namespace qcow::test {

/// A loop device of zeros, as long as this lives. Only root can have it, where there are loop devices.
class LoopDevice {
public:
    explicit LoopDevice(std::uint64_t bytes) {
        const auto file = directory_ / "file";
        write_file(file, "");
        std::filesystem::resize_file(file, bytes);
        if (geteuid() != 0) {
            obstacle_ = "only root can have a loop device";
            return;
        }
        try {
            path_ = must_run({"losetup", "--find", "--show", file}).out;
            path_.pop_back();  // the end of the line
        } catch (const std::exception& error) {
            obstacle_ = error.what();
        }
    }
    LoopDevice(const LoopDevice&) = delete;
    LoopDevice& operator=(const LoopDevice&) = delete;
    ~LoopDevice() {
        if (obstacle_.empty()) run({"losetup", "--detach", path_});
    }

    /// Why there is none; empty if there is.
    [[nodiscard]] const std::string& obstacle() const { return obstacle_; }
    [[nodiscard]] const std::string& path() const { return path_; }

private:
    TemporaryDirectory directory_;
    std::string path_;
    std::string obstacle_;
};

}  // namespace qcow::test
