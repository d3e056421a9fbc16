#pragma once
// Whole-disk jobs: walks over the extents of Disks.

#include <cstdint>
#include <optional>
#include <vector>

#include "qcow/disk.h"
#include "qcow/job.h"

namespace qcow {

class Image;

/// What a copy could not read. It became zeros in the target.
struct Losses {
    struct Range {
        GuestRange bytes;
        Error why;  ///< what is wrong with its first bytes
    };
    /// In guest order. Neighbours with the same Errc are one range.
    std::vector<Range> ranges;
    std::uint64_t bytes = 0;           ///< all that is lost
    std::uint64_t unlisted_bytes = 0;  ///< what of them is in no range, because there would be more than `max_ranges`

    static constexpr std::size_t max_ranges = 10'000;
};

struct CopyOptions {
    unsigned workers = 0;  ///< threads; 0: one a processor
    /// Runs of zeros in the source that are at least this long become zeros without storage in the target; 0: every
    /// byte is written, so that the target has storage for all of them.
    std::uint64_t sparse_bytes = 4096;
    bool target_is_zero = false;  ///< the target reads as zeros already: where sparse_bytes is not 0, they are skipped
    /// What the target holds already is not written, so that an overlay takes only what differs from its backing file.
    bool skip_equal = false;
    /// Where set, the copy goes on past what is damaged (Errc::corrupt) or what the system cannot read (Errc::io), and
    /// tells here what was lost, also when it fails. As little is given up as can be: a cluster whose mapping or stream
    /// is damaged, the sectors that the system cannot read, what a damaged table maps.
    Losses* salvage = nullptr;
    JobControl control = {};  ///< progress is in guest bytes
};

/// Makes the first source.size() bytes of `target` equal to `source`, in parallel. The target must be at least as
/// large. A source that ends within a sector goes on with zeros to the sector's end, as far as the target does. Does
/// not flush. Memory: workers x 4 pieces of 256 KiB or a block.
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
