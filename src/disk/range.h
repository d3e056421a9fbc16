#pragma once

#include <fmt/format.h>

#include "base/bits.h"
#include "base/try.h"
#include "qcow/disk.h"

namespace qcow {

/// Errc::invalid_argument unless [at, at + length) lies within the disk.
Result<void> verify_range(const Disk& disk, GuestOffset at, std::uint64_t length);

/// What resize says where the disk would lose bytes and the caller did not allow it.
std::unexpected<Error> refuse_to_shrink(const Disk& disk, std::uint64_t size);

}  // namespace qcow
