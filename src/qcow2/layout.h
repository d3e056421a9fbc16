#pragma once
// What a new image stores, and how long its file gets. Pure arithmetic.

#include <cstdint>

#include "format/geometry.h"
#include "format/header.h"
#include "qcow/create.h"

namespace qcow::qcow2 {

/// The clusters of the refcounts of a file.
struct RefcountClusters {
    std::uint64_t blocks = 0;
    std::uint64_t table = 0;
};

/// Returns what it takes to count `clusters` host clusters, and the refcount blocks and the table themselves.
RefcountClusters refcount_clusters(std::uint64_t clusters, unsigned cluster_bits, unsigned refcount_order);

/// Errors: Errc::limit_exceeded: the refcount table is larger than readers accept.
Result<void> verify_refcounts_fit(const RefcountClusters& refcounts, unsigned cluster_bits);

/// What a new image records for whole guest clusters.
enum class Recorded : std::uint8_t {
    nothing,  ///< no entry
    zeros,    ///< an entry that leads to no cluster
    cluster,  ///< an entry that leads to a cluster
};

/// What a new image records where the source has no data.
struct EmptyClusters {
    EmptyClusters(const format::Header& header, Preallocation preallocation);

    Recorded holes = Recorded::nothing;  ///< for clusters that read as the backing file, or as zeros without one
    Recorded zeros = Recorded::zeros;    ///< for zeros that hide the backing file
};

/// Counts what a new image stores. Runs come in guest order, and each begins behind the previous one.
class SpaceCount {
public:
    explicit SpaceCount(const format::Header& header) : header_(header), geometry_(header) {}

    /// Adds the whole clusters of the guest bytes [begin, end).
    void add(std::uint64_t begin, std::uint64_t end, Recorded recorded);

    /// Returns the length of the image file in bytes.
    [[nodiscard]] std::uint64_t file_bytes() const;
    /// Errors: Errc::limit_exceeded: see verify_refcounts_fit.
    [[nodiscard]] Result<void> verify_fits() const;

private:
    [[nodiscard]] std::uint64_t counted_clusters() const;
    [[nodiscard]] RefcountClusters refcounts() const;

    const format::Header& header_;
    format::Geometry geometry_;
    std::uint64_t data_clusters_ = 0;
    std::uint64_t l2_tables_ = 0;
    std::uint64_t next_table_ = 0;  // the first L1 index that is not counted
};

}  // namespace qcow::qcow2
