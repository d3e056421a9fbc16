#pragma once
// How often, and as what, each host cluster is referenced: what a check counts.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "qcow/error.h"

namespace qcow::qcow2 {

/// What the references to one cluster are, summed up.
struct References {
    std::uint32_t word = 0;

    static constexpr unsigned count_bits = 26;
    static constexpr std::uint32_t max_count = (1U << count_bits) - 1;  // more are counted as this many

    // As what it is referenced. More than one of these is an overlap.
    static constexpr std::uint32_t metadata = 1U << 26;  // header, L1, refcounts, snapshots, bitmaps, encryption header
    static constexpr std::uint32_t l2_table = 1U << 27;
    static constexpr std::uint32_t data = 1U << 28;
    static constexpr std::uint32_t compressed = 1U << 29;
    static constexpr std::uint32_t uses = metadata | l2_table | data | compressed;
    // What the active mapping says of its refcount.
    static constexpr std::uint32_t copied = 1U << 30;
    static constexpr std::uint32_t not_copied = 1U << 31;

    [[nodiscard]] std::uint32_t count() const { return word & max_count; }
};

/// Four bytes a cluster, taken in chunks where there are references: a file that is nearly all hole may be very long.
/// Adding is thread-safe; looking is, too, once nobody adds any more.
class ReferenceMap {
public:
    static constexpr std::uint64_t chunk_clusters = 4096;

    /// For host clusters 0 to `clusters` - 1. Errc::limit_exceeded if even an empty map would not fit in the budget.
    static Result<std::unique_ptr<ReferenceMap>> create(std::uint64_t clusters, std::size_t budget_bytes);

    /// Adds `count` references of a kind (bits of References) to each of `length` clusters, all of them < clusters().
    /// Errc::limit_exceeded.
    Result<void> add(std::uint64_t first, std::uint64_t length, std::uint64_t count, std::uint32_t kind);

    /// Replaces the references of a cluster (< clusters()). Not thread-safe. Errc::limit_exceeded.
    Result<void> set(std::uint64_t cluster, References references);

    [[nodiscard]] References at(std::uint64_t cluster) const;

    /// The references of the clusters from `cluster` (< clusters()) to the end of its chunk; empty: all have none.
    [[nodiscard]] std::span<const References> chunk_from(std::uint64_t cluster) const;

    /// The first cluster from `first` to `last` - 1 that has references; `last` if none has.
    [[nodiscard]] std::uint64_t next_used(std::uint64_t first, std::uint64_t last) const;

    [[nodiscard]] std::uint64_t clusters() const { return clusters_; }

private:
    /// Guarded by a lock of its own, so that a run of clusters costs one lock and not an atomic operation for each.
    struct Chunk {
        std::mutex mutex;
        std::array<References, chunk_clusters> references = {};
    };

    // A tree of three levels finds a chunk by its number. A node is null where there are no references.
    static constexpr std::uint64_t directory_chunks = 512;
    using Directory = std::array<std::atomic<Chunk*>, directory_chunks>;
    static constexpr std::uint64_t region_chunks = 4096 * directory_chunks;
    using Region = std::array<std::atomic<Directory*>, region_chunks / directory_chunks>;

    ReferenceMap(std::uint64_t clusters, std::size_t budget_bytes);
    [[nodiscard]] Directory* find_directory(std::uint64_t chunk) const;
    [[nodiscard]] Chunk* find_chunk(std::uint64_t cluster) const;
    Result<Chunk*> chunk_for(std::uint64_t cluster);
    template <class Node>
    Result<Node*> grow(std::atomic<Node*>& link, std::vector<std::unique_ptr<Node>>& owner);

    std::uint64_t clusters_;
    std::size_t budget_bytes_;
    std::size_t used_bytes_ = 0;
    std::vector<std::atomic<Region*>> regions_;
    std::mutex growth_;
    std::vector<std::unique_ptr<Region>> owned_regions_;
    std::vector<std::unique_ptr<Directory>> owned_directories_;
    std::vector<std::unique_ptr<Chunk>> owned_chunks_;
};

}  // namespace qcow::qcow2
