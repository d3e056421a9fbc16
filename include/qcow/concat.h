#pragma once
// Several disks, one behind the other, as one.

#include <memory>
#include <vector>

#include "qcow/disk.h"

namespace qcow {

/// A disk for reading with the contents of all `parts`. Each begins at a multiple of 512 bytes, as for QEMU: what a
/// part lacks to one is zeros. Errc::limit_exceeded for parts that are longer than 2^63 bytes together.
QCOW_API Result<std::shared_ptr<Disk>> concatenate(std::vector<std::shared_ptr<Disk>> parts);

}  // namespace qcow
