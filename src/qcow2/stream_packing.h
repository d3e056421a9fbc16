#pragma once
// Compressed streams that get other places in the file.

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "qcow2/cluster_moves.h"
#include "qcow2/metadata/reservations.h"

namespace qcow::qcow2 {

/// The streams that lie, at least in part, in the clusters `sources` (in ascending order), without targets. One walk.
Result<std::vector<StreamMove>> find_streams(const Metadata& metadata, std::span<const std::uint64_t> sources,
                                             unsigned workers);

/// Gives the streams, by `from` and `length`, places in free clusters, one behind the other. Those of the last streams
/// for which there is no room are removed. Streams that share a sector stay together. No cluster gets more references
/// than a refcount can express.
void pack_streams(const Metadata& metadata, std::span<const ClusterRun> free, std::vector<StreamMove>& streams);

/// Which of these data clusters (in ascending order) can be compressed: only entries that are plain, and map all of the
/// cluster, lead to them. One walk.
Result<std::vector<std::uint64_t>> find_plain_clusters(const Metadata& metadata,
                                                       std::span<const std::uint64_t> clusters, unsigned workers);

/// Compresses data clusters. Those that do not become smaller are left out. `level`: see codec::make_compressor.
Result<std::vector<CompressedCluster>> compress_clusters(const Metadata& metadata, const ReferenceMap& references,
                                                         std::span<const std::uint64_t> clusters,
                                                         std::optional<int> level, unsigned workers);

/// Gives the compressed clusters places in free clusters, one behind the other, byte by byte. Those of the last ones
/// for which there is no room are removed. No cluster gets more references than a refcount can express.
void pack_compressed(const Metadata& metadata, std::span<const ClusterRun> free,
                     std::vector<CompressedCluster>& compressed);

}  // namespace qcow::qcow2
