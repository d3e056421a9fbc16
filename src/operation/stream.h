#pragma once

#include "qcow/files_in_use.h"
#include "qcow/stream.h"

namespace qcow {

/// Opens what is_stream and writes all of the disk to it. Standard output may be a file, which must not be in use.
/// Errc::invalid_argument for a terminal.
Result<void> stream_to(Disk& disk, const std::string& path, FilesInUse& in_use, const JobControl& control);

}  // namespace qcow
