#pragma once
// The refcounts of an image, compared with the references that were counted.

#include <cstdint>
#include <optional>
#include <span>

#include "qcow/job.h"
#include "qcow2/findings.h"
#include "qcow2/metadata/metadata.h"
#include "qcow2/reference_map.h"

namespace qcow::qcow2 {

/// What a comparison takes. Everything outlives it.
struct CountedReferences {
    const Metadata& metadata;
    const ReferenceMap& references;
    /// The refcount blocks by index in the refcount table, 0 for none; empty: there is no refcount to compare with.
    std::span<const HostOffset> blocks;
    std::uint64_t file_bytes = 0;  ///< as of the walk
    bool uncounted = false;        ///< references exist that could not be followed
    unsigned workers = 1;          ///< threads; 0: one a processor
    const JobControl& control;
};

struct ComparedRefcounts {
    std::uint64_t image_end = 0;         ///< host offset behind the last cluster that is in use
    std::uint64_t counted_past_end = 0;  ///< clusters past the end of the file with a refcount
    /// The first cluster in the file that a write could destroy although something else refers to it.
    std::optional<Error> undercounted = {};
};

/// Compares each refcount with the references to its cluster, and the COPIED flags with the refcounts. A cluster with
/// several uses is an overlap; a refcount block that overlaps is not believed. Reads each block once, and no hole.
/// Errors: io, cancelled.
Result<ComparedRefcounts> compare_refcounts(const CountedReferences& counted, Findings& findings);

}  // namespace qcow::qcow2
