#pragma once

#include <memory>

#include "qcow/disk.h"

namespace qcow {

/// `disk` with zeros behind it, `size` bytes in all; `disk` itself where it has as many. `disk` must outlive it.
std::shared_ptr<Disk> padded(Disk& disk, std::uint64_t size);

}  // namespace qcow
