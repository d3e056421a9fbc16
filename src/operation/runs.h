#pragma once

#include <optional>

#include "qcow/disk.h"

namespace qcow {

/// A run of a disk as a job reads it.
struct Run {
    Extent extent;
    bool zeros = false;  ///< known to read as zeros
};

/// Finds the runs of a disk, from front to back. Not thread-safe.
class Runs {
public:
    explicit Runs(Disk& disk) : disk_(disk) {}

    /// Returns the run that begins at `at`: at or behind where the last one began, and within the disk. Zeros that are
    /// stored in the same way are one run, of about 1 GiB at most.
    Result<Run> at(GuestOffset at);

private:
    [[nodiscard]] Result<Run> find(GuestOffset at) const;

    Disk& disk_;
    Run run_;                  // the last one
    std::optional<Run> next_;  // the one behind it, where it is known already
};

/// Whether a run of data lies within its file. Of one that does not, only reading tells what it holds.
Result<bool> lies_in_file(const Extent& extent);

}  // namespace qcow
