#pragma once
// The refcounts of an image that is being written.
// Source: the qcow2 specification, "Host cluster management".

#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <vector>

#include "format/refcount.h"
#include "qcow2/metadata/metadata_map.h"
#include "qcow2/metadata/write_back.h"

namespace qcow::qcow2 {

/// Clusters one behind the other, by number.
struct ClusterRun {
    std::uint64_t first = 0;
    std::uint64_t count = 0;
    [[nodiscard]] std::uint64_t end() const { return first + count; }
};

/// The clusters that [at, at + bytes) touches; bytes > 0.
inline ClusterRun clusters_of(HostOffset at, std::uint64_t bytes, unsigned cluster_bits) {
    const std::uint64_t first = at.value >> cluster_bits;
    return {first, ((at.value + bytes - 1) >> cluster_bits) - first + 1};
}

/// Reads and changes refcounts in the cache, and adds blocks and table clusters as the file grows. The table itself is
/// in memory, 8 MiB at most. Not thread-safe.
class Refcounts {
public:
    Refcounts(Metadata& metadata, WriteBack& write_back, MetadataMap& map);

    /// Reads the table. Errc::corrupt.
    Result<void> load();

    [[nodiscard]] Result<std::uint64_t> get(std::uint64_t cluster) const;

    /// The refcount of each cluster of the run, as many as `counts` has.
    [[nodiscard]] Result<void> load_run(ClusterRun run, std::span<std::uint64_t> counts) const;

    struct Leading {
        std::uint64_t count = 0;  ///< at least 1
        bool is_one = false;
    };
    /// How many of the first clusters of the run, which is not empty, have refcount 1; or how many have another.
    [[nodiscard]] Result<Leading> leading(ClusterRun run) const;

    /// Adds `delta` to the refcount of each cluster of the run, all of which have blocks. Errc::limit_exceeded where
    /// one would become too large, Errc::corrupt where it would fall below zero, Errc::no_space where a block has none
    /// in the file; then none is changed.
    Result<void> add(ClusterRun run, std::int64_t delta);

    /// Makes the refcount of a cluster that has a block this. Errc::limit_exceeded where it is too large.
    Result<void> set(std::uint64_t cluster, std::uint64_t count);

    /// The first run of clusters with refcount 0 in [from, end), `most` at most (> 0); empty: there is none.
    [[nodiscard]] Result<ClusterRun> find_free(std::uint64_t from, std::uint64_t end, std::uint64_t most) const;

    /// The first cluster of [from, end) whose refcount is not 0; `end` if there is none. To be used only where nothing
    /// from `from` on was counted since the refcounts were last written: what is a hole in the file is not looked at.
    [[nodiscard]] Result<std::uint64_t> next_counted(std::uint64_t from, std::uint64_t end) const;

    /// One past the last cluster, from `from` on, whose refcount is not 0; `from` if there is none. The same holds.
    [[nodiscard]] Result<std::uint64_t> counted_end(std::uint64_t from) const;

    /// Sees to it that the clusters from `first` on, which are free, have blocks for `count` of them behind those that
    /// blocks and table take themselves; gives how many these are. On the way the file gets long enough for blocks and
    /// table, not for the rest. Errc::no_space where the format's limit or the file system's is reached.
    Result<std::uint64_t> cover(std::uint64_t first, std::uint64_t count);

    /// The same for the blocks of these clusters, wherever they are, put behind `tail`, where the file ends.
    Result<void> add_blocks_for(std::span<const std::uint64_t> clusters, std::uint64_t tail);

    /// Writes what an earlier failure has left unwritten of the table. To be called before anything relies on a count.
    Result<void> write_table();

    [[nodiscard]] bool is_covered(std::uint64_t cluster) const { return has_block(cluster / per_block_); }
    [[nodiscard]] std::uint64_t per_block() const { return per_block_; }
    [[nodiscard]] unsigned order() const { return order_; }

private:
    [[nodiscard]] std::string place_of(std::uint64_t cluster) const;
    [[nodiscard]] std::unexpected<Error> too_large(std::uint64_t cluster) const;
    struct Growth;
    [[nodiscard]] Growth plan_growth(std::uint64_t first, std::uint64_t count,
                                     std::span<const std::uint64_t> clusters = {}) const;
    Result<std::uint64_t> carry_out(const Growth& growth, std::uint64_t count);
    Result<void> grow(const Growth& growth);
    [[nodiscard]] std::vector<std::byte> encode_table(std::uint64_t first, std::uint64_t count) const;
    Result<void> replace_table(HostOffset at, std::uint64_t clusters);
    Result<void> reserve_space(ClusterRun run);
    [[nodiscard]] Result<bool> is_hole(std::uint64_t index) const;
    [[nodiscard]] bool has_block(std::uint64_t index) const { return index < table_.size() && table_[index] != 0; }
    template <class Visit>
    Result<void> each_span(ClusterRun run, Visit&& visit) const;
    template <class Visit>
    Result<void> each_counted(std::uint64_t first, std::uint64_t end, Visit&& visit) const;

    Metadata& metadata_;
    WriteBack& write_back_;
    MetadataMap& map_;
    unsigned cluster_bits_;
    unsigned order_;
    std::uint64_t per_block_;
    std::vector<std::uint64_t> table_;   // host offsets of blocks
    std::set<std::uint64_t> unwritten_;  // its entries that the file does not have yet
};

/// Makes [at, at + length) of a file zeros, growing it if it ends before.
Result<void> make_zeros(Storage& file, HostOffset at, std::uint64_t length);

}  // namespace qcow::qcow2
