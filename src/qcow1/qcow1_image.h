#pragma once
// The old qcow format, version 1, as an Image.

#include <memory>

#include "disk/pending_image.h"

namespace qcow::qcow1 {

Result<std::unique_ptr<PendingImage>> begin(std::shared_ptr<Storage> storage);

}  // namespace qcow::qcow1
