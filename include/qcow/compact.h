#pragma once
// Giving the unused space of a qcow2 image back: the job.

#include <cstddef>
#include <cstdint>
#include <optional>

#include "qcow/image_spec.h"
#include "qcow/job.h"

namespace qcow {

struct CompactJob {
    /// ImageSpec::write is not used. LUKS data need the key, since they are encrypted again as they move. `zeroes`
    /// needs it for every encrypted image.
    ImageSpec image;
    /// Clusters that hold only zeros become entries without a cluster, in the disk and in its snapshots. An image of
    /// version 2 with a backing file cannot express that, so it keeps them.
    bool zeroes = false;
    /// Compresses the data clusters of the disk and its snapshots, if they become smaller. Not for an encrypted image
    /// or an external data file.
    bool compress = false;
    std::optional<int> level = {};  ///< see ConvertOptions::level
    bool dry_run = false;           ///< find out what the job would do, and write nothing
    unsigned workers = 0;           ///< threads that read tables; 0: one per processor
    /// Memory budget, for the references (see CheckOptions::memory_bytes). A dry run also takes it for the changes of
    /// the metadata.
    std::size_t memory_bytes = std::size_t{1} << 30;
};

struct CompactResult {
    std::uint64_t size_before = 0;  ///< length of the image file in bytes
    std::uint64_t size_after = 0;   ///< of a dry run: as the job would leave it
    std::uint64_t cluster_size = 0;
    std::uint64_t leaked_clusters = 0;      ///< host clusters that nothing used, but that were counted
    std::uint64_t unmapped_clusters = 0;    ///< host clusters that hold nothing: zeros, tables that map nothing, and
                                            ///< what lies behind the end of the disk
    std::uint64_t compressed_clusters = 0;  ///< host clusters that became compressed
    std::uint64_t moved_clusters = 0;       ///< host clusters that moved, without those of compressed streams
    std::uint64_t moved_streams = 0;        ///< compressed clusters that moved
    bool changed = false;                   ///< the file was changed; of a dry run: it would be
};

/// Gives the unused space of a qcow2 image back, in place: leaked clusters, free clusters, L2 tables that map nothing,
/// and refcount blocks that count nothing. Clusters at the end of the file move into free ones in front, with the data
/// and tables of snapshots and bitmaps. Then the file is cut. The contents of the disk, its snapshots and its bitmaps
/// stay. Of an image with an external data file, the image file alone is compacted.
///
/// The job works in pieces of at most 32 MiB, so the file system needs little free space. The process may die and the
/// power may fail at any moment: the contents are the same, and running the job again completes the work. A second run
/// changes nothing. The job needs nobody else to use the image.
///
/// Progress is in bytes that move, and with CompactJob::zeroes first in bytes of L2 tables.
///
/// Errors: Errc::unsupported for formats other than qcow2, and for CompactJob::compress on encrypted images.
/// Errc::encrypted for an encrypted image, if the key that the job needs is missing or wrong; without
/// CompactJob::zeroes, a dry run needs none. Errc::corrupt if the image is not sound, was not closed, or is marked as
/// corrupt: see repair(). Errc::locked if another process uses the image; Errc::read_only, access_denied;
/// Errc::limit_exceeded if CompactJob::memory_bytes is too small; Errc::cancelled; Errc::no_space, io.
///
/// Thread safety: jobs may run at the same time. What one writes, another must not use.
QCOW_API Result<CompactResult> compact(const CompactJob& job, const JobControl& control = {});

}  // namespace qcow
