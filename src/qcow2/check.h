#pragma once
// Verification of a qcow2 image: every reference counted, and held against every refcount.

#include "qcow/check.h"
#include "qcow2/metadata/metadata.h"
#include "qcow2/reference_map.h"

namespace qcow::qcow2 {

/// Reads all of the metadata once, tables in the order in which they lie in the file, on several threads. An L2 table
/// that several L1 tables share is read once and counted as often as it is shared, so that neither many snapshots nor a
/// hostile image multiply the work. Memory: see CheckOptions::memory_bytes. `data_file`: the external data file that
/// was opened; null: there is none.
Result<CheckReport> check_image(const Metadata& metadata, const Storage* data_file, const CheckOptions& options);

/// How often each host cluster is referenced, whatever the refcounts say. Errc::corrupt where the metadata are damaged,
/// so that this cannot be told, io where they cannot be read.
Result<std::unique_ptr<ReferenceMap>> count_references(const Metadata& metadata, const CheckOptions& options);

/// Whether an image can be written without harm to what it holds: every cluster has as large a refcount as it has
/// references, and none that several share is marked as one's own. Errc::corrupt names the first that is not so;
/// limit_exceeded: it takes more memory than the options allow; io.
Result<void> verify_counted(const Metadata& metadata, const CheckOptions& options);

}  // namespace qcow::qcow2
