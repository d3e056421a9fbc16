#pragma once
// Where an image's file ought to end, by what the image itself says: files get cut when they are copied.

#include <cstdint>
#include <optional>

#include "qcow2/core.h"

namespace qcow::qcow2 {

/// How many bytes the file has at least where it is complete, by its refcounts. Nothing where these cannot be read. A
/// few refcount blocks are looked at, whatever the refcount table claims.
std::optional<std::uint64_t> counted_end(const Core& core);

/// Whether the file ends where the L1 table would begin, or within it, because a writer did not write a table of zeros:
/// nothing is counted behind it. Otherwise what is missing was cut off.
bool is_l1_left_out(const Core& core);

/// What is said of something that would lie past the end of a file of the image, its own or its data file, which was
/// cut.
std::string past_the_end(const Core& core, const Storage& file, std::string_view thing, HostOffset at);

}  // namespace qcow::qcow2
