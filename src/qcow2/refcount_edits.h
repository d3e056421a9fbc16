#pragma once
// Changes of single refcounts in an image file that nobody else uses.

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "format/refcount.h"
#include "qcow2/metadata/metadata.h"

namespace qcow::qcow2 {

/// Reads refcount blocks as they are needed, and keeps their changes until write(). Not thread-safe.
class RefcountEdits {
public:
    /// `blocks`: the refcount blocks by index in the refcount table, 0 for none. Everything outlives it.
    RefcountEdits(const Metadata& metadata, std::span<const HostOffset> blocks)
        : metadata_(metadata),
          blocks_(blocks),
          order_(metadata.header().refcount_order),
          per_block_(format::refcounts_per_block(metadata.header().cluster_bits, order_)) {}

    /// 0 for a cluster that no block counts.
    Result<std::uint64_t> get(std::uint64_t cluster);
    /// A block counts the cluster. `value` is at most format::max_refcount().
    Result<void> set(std::uint64_t cluster, std::uint64_t value);

    /// Writes all changes to the file.
    Result<void> write();

private:
    struct Block {
        std::vector<std::byte> bytes;
        bool changed = false;
    };
    Result<Block*> load(std::uint64_t index);

    const Metadata& metadata_;
    const std::span<const HostOffset> blocks_;
    const unsigned order_;
    const std::uint64_t per_block_;
    std::map<std::uint64_t, Block> loaded_;  // by index
};

}  // namespace qcow::qcow2
