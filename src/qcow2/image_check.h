#pragma once
// Verification of a qcow2 image: its references are counted, and compared with its refcounts.

#include <memory>

#include "qcow/check.h"
#include "qcow2/metadata/metadata.h"
#include "qcow2/reference_map.h"

namespace qcow::qcow2 {

/// Walks over all references of an image (see walk()), counts them, and compares the counts with the refcounts. Memory:
/// see CheckOptions::memory_bytes. `data_file`: the external data file that was opened; null: there is none.
Result<CheckReport> check_image(const Metadata& metadata, const Storage* data_file, const CheckOptions& options);

/// How often each host cluster is referenced, whatever the refcounts say. Errc::corrupt where damage of the metadata
/// makes this uncertain, io where they cannot be read.
Result<std::unique_ptr<ReferenceMap>> count_references(const Metadata& metadata, const CheckOptions& options);

/// Whether an image can be written without harm to what it holds: no cluster has a refcount that is lower than the
/// number of its references, and no shared cluster is marked COPIED. Errc::corrupt names the first that is not so;
/// limit_exceeded: it takes more memory than the options allow; io.
Result<void> verify_counted(const Metadata& metadata, const CheckOptions& options);

}  // namespace qcow::qcow2
