#pragma once
// What verification of an image finds.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "qcow/error.h"
#include "qcow/export.h"
#include "qcow/job.h"
#include "qcow/offset.h"

namespace qcow {

/// One thing that is wrong with an image. `place` and `what` say it in words, the other fields say it to programs.
struct CheckFinding {
    enum class Severity : std::uint8_t {
        leak,        ///< space that nothing uses: wasteful, harmless
        corruption,  ///< metadata that contradict each other: data are lost or will be
        error,       ///< something could not be verified
        postponed,   ///< an old refcount in an image that was not closed: opening the image for writing mends it
    };
    enum class Kind : std::uint8_t {
        other,             ///< none of the following
        leak,              ///< a refcount is higher than the references to its cluster
        refcount_too_low,  ///< a refcount is lower than the references to its cluster
        refcount_old,      ///< a refcount is wrong in an image that was not closed
        uncounted,         ///< a refcount is higher than the references that could be found; damage hides others
        overlap,           ///< a cluster is used for two purposes
        past_end,          ///< a reference leads past the end of the file
        misaligned,        ///< a reference does not lead to the beginning of a cluster
        reserved_bits,     ///< bits are set that have no meaning
        copied_flag,       ///< the COPIED flag of an entry contradicts the refcount, or the entry itself
        bad_entry,         ///< an entry contradicts itself
        bad_header,        ///< a field of the header contradicts the rest of it
        bad_table,         ///< a table cannot be used at all
        wrong_length,      ///< a structure is too short, or too long for what it describes
        duplicate_name,    ///< several bitmaps have one name
        misplaced,         ///< a cluster lies elsewhere in the data file than it has to
        backing_chain,     ///< a file that the image depends on cannot be opened
    };
    /// What would mend it.
    enum class Remedy : std::uint8_t {
        nothing,            ///< no change of the metadata does
        rebuild_refcounts,  ///< counting all references, and writing the refcounts that follow
        correct_entry,      ///< writing the entry, or the field, with other bits
        drop_entry,         ///< clearing the entry: what it leads to is lost
        copy_contents,      ///< copying what the entry leads to into a cluster of its own
        remove_bitmap,
        remove_snapshot,
    };
    Severity severity = Severity::error;
    std::string place;
    std::string what;
    Kind kind = Kind::other;
    /// The host cluster that it is about: the one that is counted or referenced in the wrong way, or the one that holds
    /// the entry at fault. In the image file, in bytes, aligned to the cluster size. Nothing: it is about no cluster.
    std::optional<HostOffset> cluster = {};
    Remedy remedy = Remedy::nothing;
};

struct CheckReport {
    std::uint64_t leaks = 0;  ///< host clusters
    std::uint64_t corruptions = 0;
    std::uint64_t errors = 0;
    std::uint64_t postponed = 0;  ///< host clusters
    bool dirty = false;           ///< its last writer kept refcounts in memory, and did not close it
    /// Host clusters past the end of the file that are counted all the same. They take no space, until the file grows.
    std::uint64_t counted_past_end = 0;
    std::vector<CheckFinding> findings;  ///< the first CheckOptions::max_findings of them

    std::uint64_t total_clusters = 0;       ///< of the virtual disk
    std::uint64_t allocated_clusters = 0;   ///< that this image stores
    std::uint64_t compressed_clusters = 0;  ///< of those
    std::uint64_t fragmented_clusters = 0;  ///< of those, not stored behind their predecessor
    std::uint64_t image_end = 0;            ///< host offset behind the last cluster in use

    [[nodiscard]] bool clean() const { return leaks == 0 && corruptions == 0 && errors == 0 && postponed == 0; }

    /// Opening the image for writing makes it clean: the refcounts of a dirty image are counted anew then. What else is
    /// wrong with it makes that fail.
    [[nodiscard]] bool mended_by_writing() const { return dirty && corruptions == 0 && errors == 0; }
};

struct CheckOptions {
    unsigned workers = 0;  ///< threads; 0: one a processor
    std::size_t max_findings = 1000;
    /// Four bytes a host cluster in use are needed, more or less; beyond this budget the check fails.
    std::size_t memory_bytes = std::size_t{1} << 30;
    JobControl control = {};  ///< progress is in bytes of the L2 tables, which take the longest
};

struct ImageSpec;

struct CheckResult {
    Format format = Format::raw;
    CheckReport report;
};

/// Opens an image and verifies its metadata, and that its backing chain can be opened. Where the chain cannot be
/// opened, that is a finding of severity `error`, and the image is verified by itself. Nothing is written. Errors:
/// those of open_image for the image itself; Errc::unsupported for a format without metadata; Errc::limit_exceeded
/// where CheckOptions::memory_bytes does not suffice; Errc::cancelled.
QCOW_API Result<CheckResult> check(const ImageSpec& spec, const CheckOptions& options = {});

}  // namespace qcow
