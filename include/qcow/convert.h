#pragma once
// The job that converts images, from file names to file names.

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "qcow/create.h"
#include "qcow/image_spec.h"

namespace qcow {

/// What to convert, into what, and how. Plain data.
struct ConvertJob {
    struct Source {
        ImageSpec image;
        std::string snapshot = {};  ///< id or name of an internal snapshot; empty: the active state
    };

    /// An image that exists and is at least as large as the source. It keeps its format and options.
    struct ExistingTarget {
        ImageSpec image;              ///< without ImageSpec::write, the defaults of WriteOptions hold
        bool reads_as_zeros = false;  ///< the caller knows that it does: zeros are not written
        /// If set, bytes that the target or its backing file already has are not written. Must be the target's backing
        /// file, of the format Location::format if that is set. Excludes reads_as_zeros.
        std::optional<Location> backing = {};
    };

    /// A stream for raw bytes: see is_stream. Excludes `compress`, `level` and `salvage`.
    struct StreamTarget {
        std::string path;  ///< "-" is standard output
    };

    std::vector<Source> sources;  ///< at least one; several are joined as by concatenate()
    std::variant<NewImage, ExistingTarget, StreamTarget> target = {};
    unsigned workers = 0;               ///< threads; 0: one per processor
    std::uint64_t sparse_bytes = 4096;  ///< see CopyOptions::sparse_bytes; an existing target raises it to a block
    bool compress = false;              ///< only for a qcow2 target
    std::optional<int> level = {};      ///< see ConvertOptions::level
    /// The persistent bitmaps of the source that the target gets, with their bits. All but `none` need a single source,
    /// not a snapshot, and a qcow2 target of version 3 whose disk has the source's size.
    enum class Bitmaps : std::uint8_t {
        none,
        all,             ///< one that is damaged or in_use is an error
        all_but_broken,  ///< leaves such a bitmap out, with a warning
    };
    Bitmaps bitmaps = Bitmaps::none;
    bool salvage = false;  ///< continue past unreadable bytes: see CopyOptions::salvage
};

struct ConvertResult {
    std::string path;               ///< the target's
    std::uint64_t bytes = 0;        ///< the source's size
    Losses losses;                  ///< what could not be read, with `salvage`; zeros in the target
    std::vector<Warning> warnings;  ///< all warnings that JobControl::warn received
};

/// Converts images. Opens the sources, makes or opens the target, copies, and makes the target durable: see
/// NewImage::contents and WriteOptions::cache.
///
/// A new target and its data file get their names only when they are complete: see NewFile. On an error or
/// cancellation, a new target is removed, and a file that had its name keeps its contents. An existing target is then
/// left with a part of the source, and a file that was written in place is left incomplete. The message says so.
///
/// The job never overwrites a file that it reads. That includes the chains of the sources, the chain of an existing
/// target, and a backing file that a source names and ImageSpec replaces or leaves out.
///
/// Progress is in bytes of the source.
/// Errors: Errc::invalid_argument for options that exclude each other, for a target that is too small, and for a target
/// that the job reads; Errc::cancelled; those of opening, reading and writing.
/// Thread safety: jobs may run at the same time. No job may use what another one writes.
QCOW_API Result<ConvertResult> convert(const ConvertJob& job, const JobControl& control = {});

}  // namespace qcow
