#include "support/loop_device.h"

namespace qcow::test {

LoopDevice::LoopDevice(std::uint64_t bytes) {
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

LoopDevice::~LoopDevice() {
    if (obstacle_.empty()) run({"losetup", "--detach", path_});
}

}  // namespace qcow::test
