#pragma once
// Repair of the structures that the header leads to: the active L1 table, the snapshot table, the bitmap directory.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "qcow2/repair_plan.h"

namespace qcow::qcow2 {

/// The first cluster of an image whose header can be parsed once a repair has corrected it.
struct ParsableHeader {
    std::vector<std::byte> cluster;
    bool corrected = false;
};
/// Corrects the place and the length of the active L1 table, and snapshots that an external data file excludes.
Result<ParsableHeader> read_parsable_header(const Storage& file);

/// A header that leads to repaired structures.
struct RepairedHeader {
    /// What to write at host offset 0: see HeaderEdit::steps(). Empty: the header stays.
    std::vector<std::vector<std::byte>> steps;
    std::vector<RepairLoss> losses;
};

/// Whether the snapshot table has something that a check lets pass, but other readers refuse.
Result<bool> has_refused_snapshots(const Metadata& metadata);

/// Writes the structures that the plan names, in repaired form, to new clusters of `file`. Structures that cannot be
/// repaired are left out.
Result<RepairedHeader> repair_directories(const Metadata& metadata, const RepairPlan& plan, NewClusters& added,
                                          Storage& file);

struct RemovedBitmaps {
    std::vector<std::vector<std::byte>> steps;  ///< see RepairedHeader
    std::vector<std::string> names;
};

/// Writes a bitmap directory without the bitmaps that are marked as inconsistent to new clusters of `file`. Writes
/// nothing if there are none.
Result<RemovedBitmaps> remove_inconsistent_bitmaps(const Metadata& metadata, NewClusters& added, Storage& file);

/// What to write at host offset 0 to change these fields of the header.
Result<std::vector<std::vector<std::byte>>> header_steps(const Storage& file, const format::HeaderState& state);

/// Writes the steps of a change of the header (see format::HeaderEdit), each durable before the next.
Result<void> write_header(Storage& file, const std::vector<std::vector<std::byte>>& steps);

}  // namespace qcow::qcow2
