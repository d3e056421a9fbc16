#pragma once
// How long the file of an image would be without unused space.

#include <cstdint>
#include <span>

#include "qcow2/metadata/metadata.h"
#include "qcow2/reference_map.h"

namespace qcow::qcow2 {

struct CompactSize {
    std::uint64_t clusters = 0;                 ///< of the file
    std::uint64_t refcount_blocks = 0;          ///< of those
    std::uint64_t refcount_table_clusters = 0;  ///< of those
};

/// The size of the file of a sound image without unused space: its clusters that have references, and as many refcount
/// blocks and clusters of the refcount table as they need. `references` include those of the refcount structures.
/// `blocks`: the refcount blocks that the file has, by index, 0 for none.
CompactSize compact_size(const Metadata& metadata, const ReferenceMap& references, std::span<const HostOffset> blocks);

}  // namespace qcow::qcow2
