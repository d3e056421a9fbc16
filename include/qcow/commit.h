#pragma once
// Writing the contents of an image into a layer below it: the job.

#include <cstdint>
#include <string>
#include <vector>

#include "qcow/image_spec.h"

namespace qcow {

struct CommitJob {
    ImageSpec image;  ///< ImageSpec::write says how both images are written; without it the defaults hold
    /// The layer that gets the contents: a path, or a name that a layer of the chain records. A relative path starts at
    /// the current directory or at the directory of the image. Empty: the backing file of the image.
    std::string base = {};
    bool keep = false;     ///< leave the image as it is; it is then opened only for reading
    unsigned workers = 0;  ///< threads; 0: one per processor
};

struct CommitResult {
    std::uint64_t bytes = 0;         ///< the size of the image's disk
    std::uint64_t copied_bytes = 0;  ///< written into the base: data, and zeros in the place of data
    std::vector<Warning> warnings;   ///< all that JobControl::warn was told
};

/// Writes into a layer of the image's backing chain, the base, what the layers above it hold: data, zeros, and the
/// zeros behind the end of a layer that is shorter than the image. Then empties the image, so that the base shows
/// through. If the base is not directly below the image, the image first gets it as its backing file. The contents of
/// the image's disk stay the same.
///
/// A base that is smaller than the image grows first. A larger one keeps its size, and what it has behind the end of
/// the image. Data that are stored compressed are written compressed, where they make up whole clusters of a qcow2
/// base.
///
/// The job can be cancelled, and the process may die, at any moment: the contents of the image are the same, and the
/// job can be run again.
///
/// Other images that depend on the base change: the layers between the image and the base, and other overlays. The
/// image's internal snapshots do, too, if they take something from the base. The job warns of the layers in between and
/// of the snapshots before it writes.
///
/// Progress is in bytes of the disk. Errors, before anything changes: Errc::invalid_argument: the image has no backing
/// file, or the chain has no layer of that name; ImageSpec::backing or Location::alone replaces the chain that the
/// image records; the base is raw, and that is not recorded; Errc::locked: another process uses the base;
/// Errc::unsupported: the base or the image has a format that cannot be written, or the base cannot grow.
/// Errc::cancelled; those of opening, reading, writing, Image::resize, Image::change_backing and Image::make_empty.
/// Thread safety: jobs may run at the same time. What one writes, another must not use.
QCOW_API Result<CommitResult> commit(const CommitJob& job, const JobControl& control = {});

}  // namespace qcow
