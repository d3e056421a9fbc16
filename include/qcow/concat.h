#pragma once
// Joins several disks into one.

#include <memory>
#include <vector>

#include "qcow/disk.h"

namespace qcow {

/// Returns a read-only disk with the contents of `parts`, one behind the other. Each part is filled up with zeros to a
/// multiple of 512 bytes. Errors: Errc::limit_exceeded if all parts together are longer than 2^63 bytes.
QCOW_API Result<std::shared_ptr<Disk>> concatenate(std::vector<std::shared_ptr<Disk>> parts);

}  // namespace qcow
