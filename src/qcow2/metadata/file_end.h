#pragma once
// Where the refcounts say that a file ends. Files get cut when they are copied.

#include <cstdint>

#include "format/header.h"
#include "qcow/storage.h"

namespace qcow::qcow2 {

/// Returns the length in bytes that the file of a complete image has at least, by its refcounts. Looks at a few
/// refcount blocks, whatever the refcount table claims. Errors: Errc::corrupt, io.
Result<std::uint64_t> find_counted_end(const Storage& file, const format::FixedHeader& header,
                                       const format::HeaderState& state);

/// Returns whether the refcounts count nothing but what an image without data has: its header, the refcounts and the
/// active L1 table. False also where that cannot be told. Errors: Errc::corrupt, io.
Result<bool> counts_no_data(const Storage& file, const format::FixedHeader& header, const format::HeaderState& state);

}  // namespace qcow::qcow2
