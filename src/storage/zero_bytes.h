#pragma once

#include "qcow/storage.h"

namespace qcow {

/// Writes zeros, which take space where holes would not.
Result<void> write_zero_bytes(Storage& storage, HostOffset at, std::uint64_t length);

}  // namespace qcow
