#pragma once
// Moving host clusters and compressed streams within an image file that nobody else uses.

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "qcow/job.h"
#include "qcow2/metadata/metadata.h"
#include "qcow2/reference_map.h"

namespace qcow::qcow2 {

/// `count` host clusters, from cluster `from` on, go to the clusters from `to` on. Nobody uses those.
struct ClusterMove {
    std::uint64_t from = 0;
    std::uint64_t to = 0;
    std::uint64_t count = 0;
};

/// A compressed stream goes to a place with the same offset within its sector, so its entries change in their offset
/// alone. Where it shares a sector with its neighbour, both move as far.
struct StreamMove {
    HostOffset from;
    std::uint64_t length = 0;  ///< as its entries say it
    HostOffset to;
    std::uint64_t references = 0;  ///< entries that lead to it, counted as refcounts count them
};

/// The data of a plain host cluster that get compressed. All entries that lead to it are plain, and map all of it.
struct CompressedCluster {
    std::uint64_t from = 0;  ///< cluster
    HostOffset to = {};
    std::uint64_t references = 0;  ///< entries that lead to it, counted as refcounts count them
    std::vector<std::byte> stream = {};
};

/// Moves that are made together. Sources and targets do not overlap, and no target is the source of another move.
struct Moves {
    std::vector<ClusterMove> clusters = {};          ///< by `from`
    std::vector<StreamMove> streams = {};            ///< by `from` and `length`
    std::vector<CompressedCluster> compressed = {};  ///< by `from`

    [[nodiscard]] bool empty() const { return clusters.empty() && streams.empty() && compressed.empty(); }
    void sort();
};

/// The cluster in which the contents of `cluster` are after the moves.
std::uint64_t moved(const Moves& moves, std::uint64_t cluster);

/// How contents are copied.
struct Copying {
    unsigned workers = 1;  ///< threads that call `copy`
    enum class Contents : std::uint8_t {
        data,      ///< of plain clusters: encrypted where the image is
        streams,   ///< compressed
        metadata,  ///< a later step of the same job reads them again
    };
    /// Copies bytes.
    std::function<Result<void>(HostOffset from, HostOffset to, std::uint64_t length, Contents contents)> copy;
    /// Writes the data of a compressed cluster, or over what nothing leads to.
    std::function<Result<void>(HostOffset to, std::span<const std::byte> stream)> write;
    /// Makes all of that durable.
    std::function<Result<void>()> flush;
};

/// The references and refcount blocks of an image without leaks, which follow the moves.
struct CountedImage {
    ReferenceMap& references;
    std::vector<HostOffset>& blocks;  ///< refcount blocks by index in the refcount table, 0 for none
};

/// Carries out the moves, in four steps, each durable before the next. The last one becomes so with the next flush:
/// 1. The targets get the refcounts of the sources, and their contents.
/// 2. All entries that lead to a source lead to its target, in the tables of the image, its snapshots and its bitmaps,
///    and in the copies of those that move.
/// 3. So do the fields of the header. The old place of key slots is overwritten.
/// 4. The sources are free.
/// Until the last step a source that something leads to has the same contents as its target. So after a crash each
/// entry leads to one of two good copies, and no refcount is lower than the number of references. A refcount may be
/// higher.
///
/// Errors: io, no_space, no_memory; corrupt where the image is not sound.
Result<void> carry_out(const Metadata& metadata, const Moves& moves, const CountedImage& counted,
                       const Copying& copying, unsigned workers);

}  // namespace qcow::qcow2
