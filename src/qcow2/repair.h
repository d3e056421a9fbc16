#pragma once
// Repair of one image file.

#include <memory>

#include "qcow/repair.h"
#include "qcow/storage.h"

namespace qcow::qcow2 {

/// See qcow::repair(). `data_file`: the external data file; null: there is none.
Result<RepairResult> repair_image(std::shared_ptr<Storage> file, const Storage* data_file,
                                  const RepairOptions& options);

}  // namespace qcow::qcow2
