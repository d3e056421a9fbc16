#pragma once

#include <fmt/format.h>

#include "base/bits.h"
#include "base/try.h"
#include "qcow/disk.h"

namespace qcow {

/// Errc::invalid_argument unless [at, at + length) lies within the disk.
Result<void> verify_range(const Disk& disk, GuestOffset at, std::uint64_t length);

}  // namespace qcow
