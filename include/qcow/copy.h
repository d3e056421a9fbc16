#pragma once
// Jobs on whole disks: copying, and measuring what a chain stores.

#include <cstdint>
#include <optional>
#include <vector>

#include "qcow/disk.h"
#include "qcow/job.h"

namespace qcow {

class Image;

/// What a copy could not read. The target has zeros there.
struct Losses {
    struct Range {
        GuestRange bytes;
        Error why;  ///< the error of the range's first bytes
    };
    /// In guest order. Adjacent ranges with the same Errc are merged.
    std::vector<Range> ranges;
    std::uint64_t bytes = 0;           ///< all lost bytes
    std::uint64_t unlisted_bytes = 0;  ///< lost bytes that are in no range, since `max_ranges` was reached

    static constexpr std::size_t max_ranges = 10'000;
};

struct CopyOptions {
    unsigned workers = 0;  ///< threads; 0: one per processor
    /// Runs of at least so many zero bytes get no storage in the target. 0: every byte is written, and the target has
    /// storage for all of them.
    std::uint64_t sparse_bytes = 4096;
    bool target_is_zero = false;  ///< the target reads as zeros: zeros are skipped, unless sparse_bytes is 0
    /// Bytes that the target already has are not written. So an overlay stores only what differs from its backing file.
    bool skip_equal = false;
    /// If set, the copy continues past damage (Errc::corrupt) and read errors (Errc::io), and records here what was
    /// lost, also if it fails. It gives up as little as possible: clusters whose entry or stream is damaged, sectors
    /// that the system cannot read, and what a damaged table maps.
    Losses* salvage = nullptr;
    JobControl control = {};  ///< progress is in guest bytes
};

/// Copies `source` over the first source.size() bytes of `target`, on several threads. If the source ends within a
/// sector, zeros follow up to the sector's end, or the target's. Does not flush.
///
/// Memory: four pieces per worker, each of 256 KiB or one block, whichever is larger.
/// Errors: Errc::invalid_argument if the target is smaller than the source; Errc::cancelled; those of reading and
/// writing.
QCOW_API Result<void> copy_disk(Disk& source, Disk& target, const CopyOptions& options = {});

/// Copies like copy_disk, and compresses: see Image::write_compressed. `target` is open for writing. A cluster that the
/// source fills only in part is stored uncompressed, unless it is the target's last one.
QCOW_API Result<void> copy_compressed(Disk& source, Image& target, const CopyOptions& options = {},
                                      std::optional<int> level = std::nullopt);

/// What one layer of a chain contributes to the disk on top of it.
struct LayerUsage {
    std::uint64_t data_bytes = 0;
    std::uint64_t compressed_bytes = 0;
    std::uint64_t zero_bytes = 0;
    std::uint64_t fragments = 0;  ///< runs of data that are contiguous in guest and host; 1: not fragmented
};

struct Usage {
    /// By depth. The bytes of all layers and `unallocated_bytes` add up to the virtual size.
    std::vector<LayerUsage> layers;
    std::uint64_t unallocated_bytes = 0;
};

/// Measures what each layer contributes to `disk`, by visiting all of its extents.
QCOW_API Result<Usage> measure_usage(Disk& disk);

}  // namespace qcow
