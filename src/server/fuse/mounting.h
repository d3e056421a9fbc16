#pragma once
// The mount point, and who may mount on it.

#include <sys/stat.h>

#include <string>

#include "base/try.h"
#include "qcow/mount.h"
#include "storage/file.h"

namespace qcow::fuse {

inline constexpr const char* device = "/dev/fuse";

/// Returns what the mount point is, if a disk can be mounted there.
Result<struct stat> verify_mount_point(const std::string& target);

/// Verifies that this user of this system can mount.
Result<void> verify_system();

/// Mounts on `target`, an absolute path, by itself or by fusermount3. Returns the connection to the kernel.
/// Errors: Errc::access_denied.
Result<FileDescriptor> mount(const std::string& target, const struct stat& point, const MountOptions& options);

}  // namespace qcow::fuse
