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
    explicit LoopDevice(std::uint64_t bytes);
    LoopDevice(const LoopDevice&) = delete;
    LoopDevice& operator=(const LoopDevice&) = delete;
    ~LoopDevice();

    /// Why there is none; empty if there is.
    [[nodiscard]] const std::string& obstacle() const { return obstacle_; }
    [[nodiscard]] const std::string& path() const { return path_; }

private:
    TemporaryDirectory directory_;
    std::string path_;
    std::string obstacle_;
};

}  // namespace qcow::test
