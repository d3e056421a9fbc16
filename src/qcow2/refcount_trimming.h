#pragma once
// Making the refcount blocks and the refcount table of an image as few as its clusters need.

#include "qcow2/cluster_use.h"
#include "qcow2/metadata/metadata.h"

namespace qcow::qcow2 {

// Each returns whether it has changed the image file, durably, and `use` with it. Nobody else uses the file. A crash
// leaves leaks at worst. Errors: io, no_space.

/// Drops the blocks at the end of the table that count nothing but themselves and each other.
Result<bool> drop_refcount_blocks(const Metadata& metadata, ClusterUse& use);

/// Makes the refcount table end behind its last block. `metadata` are old then.
Result<bool> shrink_refcount_table(const Metadata& metadata, ClusterUse& use);

/// Adds a block for free clusters that nothing counts, at the first of them, so that clusters can move there. `size` is
/// what the file is to have.
Result<bool> add_refcount_block(const Metadata& metadata, ClusterUse& use, const CompactSize& size);

}  // namespace qcow::qcow2
