#pragma once
// Refcounts become what the references say.

#include <cstdint>
#include <utility>
#include <vector>

#include "qcow2/repair_plan.h"

namespace qcow::qcow2 {

/// What is counted: the references of an image, and those to clusters that the repair adds.
struct CountedClusters {
    const Metadata& metadata;
    const Diagnosis& diagnosis;
    const NewClusters& added;

    /// Whether the image's refcount blocks have a refcount for each cluster that has a reference.
    [[nodiscard]] bool are_covered() const;
};

/// Raises the refcounts that are lower than the references. Returns whether there were any.
Result<bool> raise_refcounts(const CountedClusters& counted, Storage& file);

enum class Lower : std::uint8_t {
    to_zero,  ///< only the refcounts of clusters without references
    all,
};

struct LoweredRefcounts {
    std::uint64_t to_zero = 0;                                     ///< clusters
    std::uint64_t to_use = 0;                                      ///< clusters that still have references
    std::vector<std::pair<HostOffset, std::uint64_t>> freed = {};  ///< runs of the clusters in the file, in bytes
};

/// Lowers the refcounts that are higher than the references. `file` null: only counts them.
Result<LoweredRefcounts> lower_refcounts(const CountedClusters& counted, Storage* file, Lower which = Lower::all);

struct NewRefcounts {
    HostOffset table;
    std::uint32_t table_clusters = 0;
};

/// Writes a new refcount table with new blocks behind everything else. They count all references, and themselves, but
/// not the refcounts that the image has. Errc::limit_exceeded if the table would be larger than readers take.
Result<NewRefcounts> write_new_refcounts(const Metadata& metadata, const Diagnosis& diagnosis, NewClusters& added,
                                         Storage& file);

}  // namespace qcow::qcow2
