#pragma once
// Repair of one image file.

#include <memory>

#include "qcow/repair.h"
#include "qcow/storage.h"

namespace qcow::qcow2 {

/// See qcow::repair(). `data_file`: the external data file; null: there is none. `fixed_size`: the file is a block
/// device, which cannot grow.
Result<RepairResult> repair_image(const std::shared_ptr<Storage>& file, const Storage* data_file,
                                  const RepairOptions& options, bool fixed_size = false);

}  // namespace qcow::qcow2
