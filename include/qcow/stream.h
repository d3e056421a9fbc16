#pragma once
// Copying a disk into a stream, such as a pipe.

#include <string>

#include "qcow/disk.h"
#include "qcow/job.h"

namespace qcow {

/// Returns whether `path` names a stream, which can only be written from front to back: standard output ("-",
/// "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"), a pipe, a terminal or another character device. Returns false if
/// nothing has that name.
QCOW_API bool is_stream(const std::string& path);

/// Writes the bytes of `range` to a file descriptor, in guest order. Messages call the descriptor `name`. Progress is
/// in bytes of the range. Memory: 1 MiB.
/// Errors: those of Disk::read; Errc::no_space and Errc::io of the descriptor; Errc::cancelled.
QCOW_API Result<void> copy_to_stream(Disk& disk, const GuestRange& range, int descriptor, const std::string& name,
                                     const JobControl& control = {});

}  // namespace qcow
