#pragma once
// qcow2, versions 2 and 3, as an Image.

#include <memory>

#include "disk/pending_image.h"

namespace qcow::qcow2 {

/// Reads and verifies the header.
Result<std::unique_ptr<PendingImage>> begin(std::shared_ptr<Storage> storage);

}  // namespace qcow::qcow2
