#pragma once
// The references of an L1 table: to L2 tables, and through them to data.
// Source: the qcow2 specification, "Snapshots": each table that leads to a cluster is a reference of it.

#include <cstdint>
#include <span>

#include "qcow2/metadata/change.h"

namespace qcow::qcow2 {

/// Counts one reference more to each L2 table that the words of an L1 table lead to, and to each cluster that these
/// tables lead to. The tables are now shared: it takes the COPIED flags off their entries. They must not change
/// meanwhile, or be freed. After an error nothing is counted. Errors: Errc::limit_exceeded: a refcount would become too
/// large; corrupt, io, no_space.
Result<void> add_references(WritableMetadata& metadata, std::span<const std::uint64_t> l1);

/// Counts one reference less to each of them. What has no other reference is free. Nothing on disk leads to the L1
/// table any more, and no request uses it. Errors: Errc::corrupt, io; then only a rebuild of the refcounts finds the
/// rest.
Result<void> remove_references(WritableMetadata& metadata, std::span<const std::uint64_t> l1);

}  // namespace qcow::qcow2
