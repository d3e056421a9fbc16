// In place of mount.cpp, where there is no libfuse.

#include "base/try.h"
#include "qcow/mount.h"

namespace qcow {

// NOLINTNEXTLINE(performance-unnecessary-value-param): the function is the one of mount.cpp
Result<std::unique_ptr<Mount>> Mount::make(std::shared_ptr<Disk>, const std::string& target, const MountOptions&) {
    return fail(Errc::unsupported, target,
                "this build cannot mount; install libfuse (Debian: libfuse3-dev) and build again");
}

void Mount::unmount(const std::string&) {}

}  // namespace qcow
