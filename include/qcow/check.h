#pragma once
// What verification of an image finds.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "qcow/error.h"
#include "qcow/export.h"
#include "qcow/job.h"

namespace qcow {

struct CheckFinding {
    enum class Severity : std::uint8_t {
        leak,        ///< space that nothing uses: wasteful, harmless
        corruption,  ///< metadata that contradict each other: data are lost or will be
        error,       ///< something could not be verified
        postponed,   ///< an old refcount in an image that was not closed: opening the image for writing mends it
    };
    Severity severity = Severity::error;
    std::string place;
    std::string what;
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
