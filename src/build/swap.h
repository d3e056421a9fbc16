#pragma once

#include "build/volume.h"

namespace qcow {

/// Makes [offset, offset + size) swap space with pages of 4 KiB. Errors: Errc::no_space for fewer than ten pages.
Result<Filled> write_swap(const Volume& volume, PlannedDisk& disk, std::uint64_t offset, std::uint64_t size);

}  // namespace qcow
