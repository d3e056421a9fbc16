#pragma once
// ImageSpec: names an image and says how to open it.

#include <memory>
#include <optional>

#include "qcow/image.h"
#include "qcow/job.h"
#include "qcow/location.h"

namespace qcow {

/// Names an image and says how it is opened. Plain data.
struct ImageSpec {
    /// Where the image lies. If Location::format is unset, the format is guessed from the contents. If Location::alone
    /// is set, the backing file is left out, and what the image does not store reads as zeros.
    Location location;
    /// Replaces the backing file that the image names.
    std::optional<Location> backing = {};
    /// The format of the backing file. Replaces the recorded one, and that of `backing`.
    std::optional<Format> backing_format = {};
    bool follow = true;        ///< see OpenOptions::follow
    bool force_share = false;  ///< see FileOptions::force_share; only for files that are read
    bool direct = false;       ///< see FileOptions::direct; only for files that are written
    /// The image is not trusted: files_beneath() opens the files that it names, in place of local_files().
    bool untrusted = false;
    KeySource keys = {};                           ///< see OpenOptions::keys
    double max_kdf_seconds = default_kdf_seconds;  ///< see OpenOptions::max_kdf_seconds
    /// How the image is written. If unset, it is opened for reading only.
    std::optional<WriteOptions> write = {};
};

/// Opens the image that `spec` names, with its chain. `warn` receives warnings about odd images.
/// Errors: those of open_storage and of the other open_image.
/// Thread safety: may be called from any number of threads.
QCOW_API Result<std::shared_ptr<Image>> open_image(const ImageSpec& spec, const Warn& warn = {});

}  // namespace qcow
