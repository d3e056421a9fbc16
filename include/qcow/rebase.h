#pragma once
// Giving an image another backing file: the job.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "qcow/image_spec.h"

namespace qcow {

struct RebaseJob {
    ImageSpec image;  ///< ImageSpec::write says how it is written; without it the defaults hold
    /// The new backing file, as a person names it: a relative path starts at the image's directory. Empty: the image
    /// gets none, and depends on no other file.
    std::string backing;
    std::optional<Format> backing_format = {};  ///< required, unless `backing` is empty or names it
    /// Record the name, and look at no data. For a backing file that was moved or renamed: if it has other contents, so
    /// does the image. Neither the old nor the new backing file has to exist.
    bool unsafe = false;
    bool compress = false;          ///< what is copied into the image, where it makes up a whole cluster
    std::optional<int> level = {};  ///< see ConvertOptions::level
    unsigned workers = 0;           ///< threads; 0: one per processor
};

struct RebaseResult {
    std::uint64_t bytes = 0;         ///< the size of the disk
    std::uint64_t copied_bytes = 0;  ///< that the image got, as the new backing file has something else there
    std::vector<Warning> warnings;   ///< all that JobControl::warn was told
};

/// Gives an image another backing file. The contents of its disk stay: the job copies into the image what it takes from
/// the old backing file and what the new one has otherwise, and then records the new one.
///
/// The job can be cancelled, and the process may die, at any moment: the image has its old contents, with the old
/// backing file or with the new one, and the job can be run again. Its bitmaps stay valid, and record nothing.
///
/// Internal snapshots that take something from the backing file do not stay the same; the job warns of them.
///
/// Progress is in bytes of the disk. Errors: Errc::invalid_argument: the new backing file is, or depends on, the image;
/// its format is not said; Errc::cancelled; those of opening, reading, writing and Image::change_backing.
/// Thread safety: jobs may run at the same time. What one writes, another must not use.
QCOW_API Result<RebaseResult> rebase(const RebaseJob& job, const JobControl& control = {});

}  // namespace qcow
