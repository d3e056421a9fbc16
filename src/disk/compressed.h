#pragma once
// Reading one compressed cluster out of a file.

#include <cstdint>
#include <span>

#include "format/entries.h"
#include "qcow/storage.h"

namespace qcow {

using Decompress = Result<void> (*)(std::span<const std::byte> in, std::span<std::byte> out);

/// Fills `to` with the cluster's bytes from `skip` on. Decodes straight into `to` where that is the whole cluster, in
/// one piece. The stream's last sector may reach past the end of the file.
Result<void> read_compressed(const Storage& storage, const format::CompressedRange& range, Decompress decompress,
                             std::uint64_t cluster_size, std::uint64_t skip, Buffers to);

}  // namespace qcow
