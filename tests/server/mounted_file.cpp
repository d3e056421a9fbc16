#include "server/mounted_file.h"

#include <fstream>

#include "qcow/mount.h"
#include "server/test_disk.h"
#include "support/temporary_directory.h"

namespace qcow::test {

int errno_of_open(const std::string& path, int flags) {
    const FileDescriptor fd(open(path.c_str(), flags | O_CLOEXEC));
    return fd.get() >= 0 ? 0 : errno;
}

void MountTest::SetUp() {
    if (access("/dev/fuse", F_OK) != 0) GTEST_SKIP() << "this system has no /dev/fuse";
    if (geteuid() != 0) GTEST_SKIP() << "only root can mount everywhere";
    const auto without = Mount::make(std::make_shared<TestDisk>(0), "/nowhere");
    if (without.error().code == Errc::unsupported) GTEST_SKIP() << without.error().message();
    const TemporaryDirectory directory;
    std::ofstream(directory.file("point"));
    const auto mount = Mount::make(std::make_shared<TestDisk>(4096), directory.file("point"));
    if (!mount && mount.error().code == Errc::access_denied) GTEST_SKIP() << mount.error().message();
}

}  // namespace qcow::test
