#pragma once
// ImageSpec: an image as a job names it, and how it is opened.

#include <memory>
#include <optional>

#include "qcow/image.h"
#include "qcow/job.h"
#include "qcow/location.h"

namespace qcow {

/// Names an image and says how it is opened. Plain data.
struct ImageSpec {
    /// Where it lies. Location::format is its format; without one, the format is told from the contents.
    /// Location::alone: the backing file is left out, so that what the image does not hold reads as zeros.
    Location location;
    /// Stands in for the backing file that the image names.
    std::optional<Location> backing = {};
    /// The format of the backing file, in place of what the image records and of `backing`.
    std::optional<Format> backing_format = {};
    bool follow = true;        ///< see OpenOptions::follow
    bool force_share = false;  ///< see FileOptions::force_share; for files that are only read
    bool direct = false;       ///< see FileOptions::direct; for files that are written
    /// The image comes from a stranger. The files that it names are opened by files_beneath() and not by local_files().
    bool untrusted = false;
    /// How it behaves as it is written. Nothing: it is only read.
    std::optional<WriteOptions> write = {};
};

/// Opens the image that `spec` names, with all that it names in turn. `warn` is told what is odd about it.
/// Errors: those of open_storage and open_image. Thread-safe.
QCOW_API Result<std::shared_ptr<Image>> open_image(const ImageSpec& spec, const Warn& warn = {});

}  // namespace qcow
