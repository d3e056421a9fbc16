#pragma once

#include "disk/copy_target.h"
#include "qcow/copy.h"

namespace qcow {

/// Hands all of `source` to `target`, in pieces, read and prepared on several threads.
Result<void> copy_to(Disk& source, CopyTarget& target, const CopyOptions& options);

}  // namespace qcow
