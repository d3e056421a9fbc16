#pragma once
// Guest bytes into what takes them from front to back, such as a pipe.

#include <string>

#include "qcow/disk.h"
#include "qcow/job.h"

namespace qcow {

/// Returns whether `path` names what can only be written from front to back: standard output ("-", "/dev/stdout"), a
/// pipe, a terminal or another character device. Returns false where nothing has that name.
QCOW_API bool is_stream(const std::string& path);

/// Writes the bytes of `range` to a file descriptor, in guest order. `name` is the descriptor's name in messages.
/// Progress is in bytes of the range.
/// Errors: those of Disk::read; Errc::no_space and Errc::io of the descriptor; Errc::cancelled.
QCOW_API Result<void> copy_to_stream(Disk& disk, const GuestRange& range, int descriptor, const std::string& name,
                                     const JobControl& control = {});

}  // namespace qcow
