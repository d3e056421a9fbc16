#pragma once
// Advisory locks between processes that use the same image file, compatible with QEMU's.
//
// Each permission has a number p. Whoever holds it has a shared lock on byte 100 + p; whoever lets nobody else have it
// has a shared lock on byte 200 + p. Conflicts are found by asking whether an exclusive lock would be granted on the
// opposite byte. Open-file-description locks, so that they belong to the open file and not to the process.

#include <string>

#include "qcow/error.h"

namespace qcow {

/// Takes the locks of a reader (consistent reads, no other writers) or of a writer (also writes and resizes). They
/// last until `fd` is closed. File systems without locks are taken as they are. Errc::locked.
Result<void> lock_file(int fd, const std::string& path, bool writable);

}  // namespace qcow
