#pragma once
// One walk over all references of an image, for everybody who asks what a host cluster is used for.

#include <cstddef>
#include <cstdint>

#include "qcow/job.h"
#include "qcow2/flaw.h"
#include "qcow2/metadata/metadata.h"

namespace qcow::qcow2 {

/// A reference from one place to host clusters: an entry that leads to them, or a structure that the header, a snapshot
/// or a bitmap leads to (the place is the structure itself, then).
struct Reference {
    Structure kind = Structure::data;  ///< what the clusters hold
    Place place = {};
    HostOffset at = {};
    /// From `at` on. The reference uses each host cluster that they touch. All of these lie in the file, except one
    /// that is preallocated, which may begin where the file's last cluster ends.
    std::uint64_t bytes = 0;
    std::uint64_t count = 1;  ///< how many references it stands for: an L2 table that is shared is visited once
    bool active = false;      ///< from the active L1 table, or from an L2 table that this leads to
    bool copied = false;      ///< the entry is marked COPIED
    std::uint64_t word = 0;   ///< of an L1 or L2 entry; of several L2 entries, the first
};

/// Is told what a walk finds. The first error that a function returns ends the walk, which returns that error.
///
/// Thread safety: the walk calls both functions from several threads at once for what L2 tables hold, and from the
/// caller's thread before.
class Visitor {
public:
    virtual ~Visitor() = default;

    virtual Result<void> reference(const Reference& reference) = 0;
    virtual Result<void> flaw(const Flaw& flaw) = 0;

    /// The first host cluster from `first` to `end` - 1 that a reference led to before; `end` if there is none. With it
    /// the walk reads no table twice, however many of them are said to lie in one place.
    [[nodiscard]] virtual std::uint64_t next_used(std::uint64_t first, std::uint64_t end) const = 0;
};

struct WalkOptions {
    /// If false, the walk follows no L2 table, and no L1 table of a snapshot, and visits no structure that is longer
    /// than images have in practice (Flaw::Kind::too_long). These are the clusters that a guard of the metadata knows.
    bool guest_data = true;
    bool refcounts = true;               ///< false: the walk does not visit the refcount table and its blocks
    const Storage* data_file = nullptr;  ///< the external data file; null: there is none, or it is not looked at
    unsigned workers = 1;                ///< threads that read L2 tables; 0: one a processor
    std::size_t memory_bytes = std::size_t{1} << 30;  ///< for the list of L2 tables
    JobControl control = {};                          ///< progress is in bytes of the L2 tables
};

/// Guest clusters of the active mapping.
struct MappedClusters {
    std::uint64_t allocated = 0;   ///< that the image stores
    std::uint64_t compressed = 0;  ///< of those
    std::uint64_t fragmented = 0;  ///< of those, not stored behind their predecessor
};

/// The length of the image file for a walk, in bytes. It includes an L1 table that was left out at the file's end.
Result<std::uint64_t> walked_length(const Metadata& metadata);

/// Visits every reference of an image, in this order: header, refcount table, encryption header, refcount blocks,
/// bitmap directory, tables and bits, the active L1 table, the snapshot table, the L1 tables of the snapshots, and what
/// the L2 tables lead to. `file_bytes` is walked_length().
///
/// The walk reads the file, and not the cache: changes have to be written before. It reads each L2 table once, in the
/// order of the file, and no hole. Data in an external data file are no references.
///
/// Errors: io; limit_exceeded where the list of L2 tables takes more memory than allowed; cancelled; those of
/// the visitor.
Result<MappedClusters> walk(const Metadata& metadata, std::uint64_t file_bytes, const WalkOptions& options,
                            Visitor& visitor);

/// Whether all of [at, at + bytes) is a hole in the file, which reads as zeros.
Result<bool> is_hole(const Storage& file, HostOffset at, std::uint64_t bytes);

}  // namespace qcow::qcow2
