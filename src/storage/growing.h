#pragma once
// A block device, taken for a file that is empty at first and grows.

#include <memory>

#include "qcow/storage.h"

namespace qcow {

/// Empties `storage`, and gives it back. One that keeps its length, as devices do, gets another in front of it, which
/// is as long as what was written to it, and makes zeros of what it grows over. Errc::no_space where the device ends.
Result<std::shared_ptr<Storage>> as_empty(std::shared_ptr<Storage> storage);

}  // namespace qcow
