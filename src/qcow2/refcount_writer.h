#pragma once
// Allocating host clusters in a new image, from front to back, and writing down their refcounts.

#include <cstdint>
#include <map>
#include <vector>

#include "qcow/error.h"
#include "qcow/storage.h"

namespace qcow::qcow2 {

/// Hands out the clusters of a new file one after the other. Refcount blocks are written when nothing can change in
/// them any more, so that memory does not grow with the file. Not thread-safe.
class RefcountWriter {
public:
    RefcountWriter(Storage& file, unsigned cluster_bits, unsigned refcount_order);

    /// The first of `clusters` clusters behind all that there are, each with a refcount of one. Writes nothing.
    HostOffset allocate(std::uint64_t clusters);

    /// One reference more to a cluster, whose refcount must be below the maximum.
    void add_reference(HostOffset cluster);

    /// The end of what was allocated.
    [[nodiscard]] HostOffset end() const { return {next_ << cluster_bits_}; }

    /// Writes, behind all that there is, the blocks of clusters below `settled`, which get no further references.
    Result<void> write_blocks_below(HostOffset settled);

    struct Table {
        HostOffset offset;
        std::uint32_t clusters = 0;
    };
    /// Writes what is left: blocks, which also describe themselves and the table, and the table. The last call.
    /// Errc::limit_exceeded where the table would be larger than readers take.
    Result<Table> finish();

private:
    std::vector<std::byte>& block_of(std::uint64_t cluster);
    Result<void> write_block(std::uint64_t index, HostOffset at);

    Storage& file_;
    unsigned cluster_bits_;
    unsigned order_;
    std::uint64_t per_block_;
    std::uint64_t next_ = 0;  // cluster
    std::map<std::uint64_t, std::vector<std::byte>> open_blocks_;
    std::vector<std::uint64_t> table_;  // entries in host byte order
};

}  // namespace qcow::qcow2
