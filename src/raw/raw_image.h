#pragma once
// The trivial format: guest offset n is host offset n.

#include <memory>

#include "disk/pending_image.h"

namespace qcow::raw {

Result<std::unique_ptr<PendingImage>> begin(std::shared_ptr<Storage> storage);

}  // namespace qcow::raw
