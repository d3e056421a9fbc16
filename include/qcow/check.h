#pragma once
// What verification of an image finds.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

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
    std::function<void(std::uint64_t done, std::uint64_t total)> progress = {};  ///< called from one thread at a time
};

}  // namespace qcow
