#pragma once
// Verification of a qcow2 image: its references are counted, and compared with its refcounts.

#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "qcow/check.h"
#include "qcow2/metadata/metadata.h"
#include "qcow2/reference_map.h"

namespace qcow::qcow2 {

/// Walks over all references of an image (see walk()), counts them, and compares the counts with the refcounts. Memory:
/// see CheckOptions::memory_bytes. `data_file`: the external data file that was opened; null: there is none.
Result<CheckReport> check_image(const Metadata& metadata, const Storage* data_file, const CheckOptions& options);

/// The table of a mapping that ends behind the file: the file was cut within the table's last cluster.
struct CutTable {
    CheckFinding finding;
    // The guest bytes that the missing entries may have mapped.
    GuestOffset guest;
    std::uint64_t length = 0;
    bool in_snapshots = false;  ///< only snapshots lead to it
};

/// What a check found out about an image, for those who repair it.
struct Diagnosis {
    CheckReport report;
    std::optional<CutTable> cut_table;
    std::unique_ptr<ReferenceMap> references;  ///< one cluster more than the file has
    /// The refcount blocks by index in the refcount table, 0 for none; empty: the refcounts were not looked at.
    std::vector<HostOffset> blocks;
    std::uint64_t file_bytes = 0;  ///< walked_length()
    bool uncounted = false;        ///< damage hides references, so the counts may be too low
};

/// The same as check_image, with all that it counted. `refcounts` false: it neither visits nor compares the refcounts.
Result<Diagnosis> diagnose(const Metadata& metadata, const Storage* data_file, const CheckOptions& options,
                           bool refcounts = true);

/// How often each host cluster is referenced, whatever the refcounts say. Errc::corrupt where damage of the metadata
/// makes this uncertain, io where they cannot be read.
Result<std::unique_ptr<ReferenceMap>> count_references(const Metadata& metadata, const CheckOptions& options);

/// Damage that makes every write to an image a danger to what it holds.
struct Hazard {
    Error damage;             ///< the first in the file
    std::string_view remedy;  ///< for a message
};

/// Finds out whether an image can be written without harm. It cannot where the file was cut, since what a write puts
/// behind the end makes the lost data look like zeros; where a refcount is lower than the number of its references; or
/// where a shared cluster is marked COPIED. `data_file`: see check_image. Errors: Errc::limit_exceeded where it takes
/// more memory than the options allow; io.
Result<std::optional<Hazard>> find_hazard(const Metadata& metadata, const Storage* data_file,
                                          const CheckOptions& options);

}  // namespace qcow::qcow2
