#pragma once
// Converting images: the whole job, from the names of files to the names of files.

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "qcow/create.h"
#include "qcow/image_spec.h"

namespace qcow {

/// What is converted, into what, and how. Plain data.
struct ConvertJob {
    struct Source {
        ImageSpec image;
        std::string snapshot = {};  ///< id or name of an internal snapshot; empty: the active state
    };

    /// An image that is there already, and at least as large as the source. It keeps its format and options.
    struct ExistingTarget {
        ImageSpec image;              ///< ImageSpec::write says how it is written; without it the defaults hold
        bool reads_as_zeros = false;  ///< the caller knows that it does, so that zeros need not be written
        /// What the target already holds, its backing file included, is not written. This has to be that backing file,
        /// and have the format that Location::format says. Excludes reads_as_zeros.
        std::optional<Location> backing = {};
    };

    /// What takes raw bytes from front to back. See is_stream.
    struct StreamTarget {
        std::string path;  ///< "-" is standard output
    };

    std::vector<Source> sources;  ///< at least one; several are joined one behind the other, as by concatenate()
    std::variant<NewImage, ExistingTarget, StreamTarget> target = {};
    unsigned workers = 0;               ///< threads; 0: one a processor
    std::uint64_t sparse_bytes = 4096;  ///< see CopyOptions::sparse_bytes
    bool compress = false;              ///< into a qcow2 image only
    std::optional<int> level = {};      ///< see ConvertOptions::level
    bool salvage = false;               ///< go on past what cannot be read: see CopyOptions::salvage
};

struct ConvertResult {
    std::string path;               ///< of the target
    std::uint64_t bytes = 0;        ///< the size of the source: all of it was copied
    Losses losses;                  ///< what `salvage` could not read. It became zeros.
    std::vector<Warning> warnings;  ///< all that JobControl::warn was told
};

/// Converts images. Opens the sources, makes or opens the target, copies, and makes the target durable.
///
/// A new target appears under its name only when it is complete, with its data file: see NewFile. On an error, and when
/// the job is cancelled, nothing of it is left, and what had its name stays as it was. An existing target then holds a
/// part of the source. The message says so, as it does of a file that had to be written in place.
///
/// No file that the job reads is overwritten. That includes the chains of the sources, the chain of an existing target,
/// and a backing file that a source names but that ImageSpec replaces or leaves out.
///
/// Progress is in bytes of the source. Errors: Errc::invalid_argument for options that exclude each other, for a target
/// that is too small, and for a target that the job reads; Errc::cancelled; those of opening, reading and writing.
/// Thread safety: jobs may run at the same time. What one writes, another must not use.
QCOW_API Result<ConvertResult> convert(const ConvertJob& job, const JobControl& control = {});

}  // namespace qcow
