#pragma once
// A disk that is encrypted as a whole: a LUKS header, and the data behind it.

#include <memory>

#include "disk/pending_image.h"

namespace qcow::luks {

Result<std::unique_ptr<PendingImage>> begin(std::shared_ptr<Storage> storage);

}  // namespace qcow::luks
