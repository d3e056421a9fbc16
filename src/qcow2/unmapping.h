#pragma once
// Taking zeros out of the mapping of an image file that nobody else uses.

#include <cstdint>

#include "qcow/job.h"
#include "qcow2/data_file.h"
#include "qcow2/metadata/metadata.h"

namespace qcow::qcow2 {

struct UnmapOptions {
    /// Data clusters that hold only zeros, and tables that map only zeros; if false, only tables without any entry.
    bool zeroes = false;
    unsigned workers = 1;     ///< threads; 0: one per processor
    JobControl control = {};  ///< progress is in bytes of L2 tables
};

/// Changes the entries of a sound image, of its disk and of its snapshots alike, so that zeros take no clusters. Each
/// entry changes at once, and means the same before and after. The refcounts stay: what nothing leads to any more is
/// leaked. `data`: of the image, with its key if it is encrypted and UnmapOptions::zeroes is set.
///
/// An image of version 2 with a backing file keeps its data clusters, and an external data file keeps all of them. A
/// table of zeros stays if the image has a backing file. Returns whether it changed anything. Errors: io, cancelled.
Result<bool> unmap_zeros(const Metadata& metadata, const DataFile& data, const UnmapOptions& options);

}  // namespace qcow::qcow2
