#pragma once
// Giving the unused space of an image file back.

#include <cstdint>
#include <memory>

#include "base/bits.h"
#include "crypto/cipher.h"
#include "qcow/compact.h"
#include "qcow/storage.h"

namespace qcow::qcow2 {

/// See qcow::compact(). `data_file`: the external data file; null: there is none. Of `job`, ImageSpec is not used.
/// `batch_bytes` move together. Where they move into holes of the file, the file system needs twice as much space,
/// until the old places are cut off. `cipher`: of encrypted data that move or among which
/// zeros are looked for; null: there are none.
Result<CompactResult> compact_image(std::shared_ptr<Storage> file, const Storage* data_file, const CompactJob& job,
                                    const JobControl& control, std::uint64_t batch_bytes = 32 * MiB,
                                    std::shared_ptr<const crypto::SectorCipher> cipher = nullptr);

}  // namespace qcow::qcow2
