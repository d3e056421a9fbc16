#pragma once
// Whole-disk jobs: walks over the extents of Disks.

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "qcow/disk.h"

namespace qcow {

class Image;

struct CopyOptions {
    unsigned workers = 0;  ///< threads; 0: one a processor
    /// Runs of zeros in the source's data that are at least this long are not written; 0: all data is written.
    std::uint64_t sparse_bytes = 4096;
    bool target_is_zero = false;  ///< the target reads as zeros already: zeros need not be written
    std::function<void(std::uint64_t done, std::uint64_t total)> progress = {};  ///< guest bytes; one call at a time
};

/// Makes the first source.size() bytes of `target` equal to `source`, in parallel. The
/// target must be at least as large. Does not flush. Memory: workers x 4 pieces of 256 KiB or a block.
QCOW_API Result<void> copy_disk(Disk& source, Disk& target, const CopyOptions& options = {});

/// The same for an image that is open for writing, whose clusters become compressed: see Image::write_compressed. A
/// cluster that the source fills only in part is written as it is.
QCOW_API Result<void> copy_compressed(Disk& source, Image& target, const CopyOptions& options = {},
                                      std::optional<int> level = std::nullopt);

/// How one layer of a chain contributes to the disk on top of it.
struct LayerUsage {
    std::uint64_t data_bytes = 0;
    std::uint64_t compressed_bytes = 0;
    std::uint64_t zero_bytes = 0;
    std::uint64_t fragments = 0;  ///< runs of data that are contiguous in guest and host; 1 is unfragmented
};

struct Usage {
    std::vector<LayerUsage> layers;  ///< by depth; sums over all layers and `unallocated_bytes` give the virtual size
    std::uint64_t unallocated_bytes = 0;
};

/// Walks the whole mapping.
QCOW_API Result<Usage> measure_usage(Disk& disk);

}  // namespace qcow
