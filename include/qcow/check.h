#pragma once
// Checking the metadata of an image, and what a check finds.

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

/// One thing that is wrong with an image. `place` and `what` are for people, the other fields are for programs.
struct CheckFinding {
    enum class Severity : std::uint8_t {
        leak,        ///< space that nothing uses; harmless
        corruption,  ///< metadata that contradict each other; data are lost or may be lost
        error,       ///< something that could not be verified
        postponed,   ///< a refcount or COPIED flag of an image that was not closed; opening it for writing corrects it
    };
    enum class Kind : std::uint8_t {
        other,             ///< none of the kinds below
        leak,              ///< a refcount is higher than the references to its cluster
        refcount_too_low,  ///< a refcount is lower than the references to its cluster
        refcount_old,      ///< a refcount is wrong in an image that was not closed
        uncounted,         ///< a refcount is higher than the references found, and damage may hide others
        overlap,           ///< a cluster is used for two purposes
        past_end,          ///< a reference points past the end of the file
        misaligned,        ///< a reference does not point to the start of a cluster
        reserved_bits,     ///< bits without a meaning are set
        copied_flag,       ///< the COPIED flag of an entry contradicts the refcount, or the entry itself
        bad_entry,         ///< the bits of an entry contradict each other
        bad_header,        ///< a header field contradicts another one
        bad_table,         ///< a table cannot be used
        wrong_length,      ///< a structure is too short or too long for what it describes
        duplicate_name,    ///< several bitmaps have the same name
        misplaced,         ///< a cluster of the data file is not at its guest offset
        bad_encryption,    ///< the header of the encryption is damaged, or this build does not have its cipher
        backing_chain,     ///< a file that the image depends on cannot be opened
    };
    /// What would repair it.
    enum class Remedy : std::uint8_t {
        nothing,            ///< no change of the metadata repairs it
        rebuild_refcounts,  ///< count all references and write the refcounts
        correct_entry,      ///< write the entry or field with other bits
        drop_entry,         ///< clear the entry; what it points to is lost
        copy_contents,      ///< copy what the entry points to into a new cluster
        remove_bitmap,
        remove_snapshot,
    };
    Severity severity = Severity::error;
    std::string place;
    std::string what;
    Kind kind = Kind::other;
    /// The host cluster with the fault: the cluster that is counted or referenced wrongly, or that holds the wrong
    /// entry. An offset in the image file, a multiple of the cluster size. Unset if the finding is about no cluster.
    std::optional<HostOffset> cluster = {};
    Remedy remedy = Remedy::nothing;
};

struct CheckReport {
    std::uint64_t leaks = 0;  ///< host clusters
    std::uint64_t corruptions = 0;
    std::uint64_t errors = 0;
    std::uint64_t postponed = 0;  ///< refcounts and COPIED flags of host clusters
    bool dirty = false;           ///< the image has the dirty bit: its last writer did not close it
    bool marked_corrupt = false;  ///< the image has the corrupt bit: a writer has met damage, and it is not written
    /// Host clusters past the end of the file with a refcount but no reference. They take no space until the file
    /// grows.
    std::uint64_t counted_past_end = 0;
    /// Bytes that the file lacks for its last table to be complete: the file was cut. If the table maps guest bytes,
    /// that is a corruption, too.
    std::uint64_t missing_bytes = 0;
    /// Names of the bitmaps that are marked as inconsistent ("in use"), at most CheckOptions::max_findings. A repair
    /// removes them on request: see RepairOptions::remove_inconsistent_bitmaps.
    std::vector<std::string> inconsistent_bitmaps;
    std::vector<CheckFinding> findings;  ///< by host offset; see CheckOptions::max_findings

    std::uint64_t total_clusters = 0;       ///< of the virtual disk
    std::uint64_t allocated_clusters = 0;   ///< of those, stored in this image
    std::uint64_t compressed_clusters = 0;  ///< of allocated_clusters
    std::uint64_t fragmented_clusters = 0;  ///< of allocated_clusters: compressed, or not behind their predecessor
    std::uint64_t image_end = 0;            ///< the host offset behind the last cluster in use
    /// The bytes by which compact() makes the file shorter, without CompactJob::zeroes. It may differ a little if there
    /// are compressed clusters. 0 if the image is damaged or dirty: compact() refuses it.
    std::uint64_t compact_bytes = 0;

    [[nodiscard]] bool clean() const { return leaks == 0 && corruptions == 0 && errors == 0 && postponed == 0; }

    /// Returns whether opening the image for writing makes it clean. Opening rebuilds the refcounts and COPIED flags of
    /// a dirty image, and fails if anything else is wrong.
    [[nodiscard]] bool mended_by_writing() const { return dirty && corruptions == 0 && errors == 0; }
};

struct CheckOptions {
    unsigned workers = 0;  ///< threads; 0: one per processor
    /// The report lists at most so many findings, and one more about the chain. It counts all of them. Postponed
    /// refcounts are listed only if the other findings leave room.
    std::size_t max_findings = 1000;
    /// Memory budget. A check needs about four bytes per host cluster in use, and fails if that exceeds the budget.
    std::size_t memory_bytes = std::size_t{1} << 30;
    JobControl control = {};  ///< progress is in bytes of L2 tables
};

struct ImageSpec;

struct CheckResult {
    Format format = Format::raw;
    CheckReport report;
};

/// Opens an image with its backing chain, and verifies the image's metadata. If the chain or the data file cannot be
/// opened, the report has a finding of severity `error`, and the image is checked alone. Nothing is written unless
/// ImageSpec::write is set.
///
/// Errors: those of open_image for the image itself; Errc::unsupported for a format without metadata;
/// Errc::limit_exceeded if CheckOptions::memory_bytes is too small; Errc::cancelled.
QCOW_API Result<CheckResult> check(const ImageSpec& spec, const CheckOptions& options = {});

}  // namespace qcow
