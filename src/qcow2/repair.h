#pragma once
// Repair of one image file.

#include <functional>
#include <memory>

#include "crypto/cipher.h"
#include "qcow/repair.h"
#include "qcow/storage.h"

namespace qcow::qcow2 {

/// Returns the cipher of data that depend on their place in the file. Null: nobody knows the key. `image` is the file
/// with the corrections of its header that are planned.
using FindCipher = std::function<Result<std::shared_ptr<const crypto::SectorCipher>>(const Storage& image)>;

/// See qcow::repair(). `data_file`: the external data file; null: there is none. `find_cipher` is called when the first
/// such data move; Errc::encrypted if it is null. `fixed_size`: the file is a block device, which cannot grow.
Result<RepairResult> repair_image(const std::shared_ptr<Storage>& file, const Storage* data_file,
                                  const RepairOptions& options, const FindCipher& find_cipher = {},
                                  bool fixed_size = false);

}  // namespace qcow::qcow2
