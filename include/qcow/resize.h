#pragma once
// The job that changes the virtual size of an image. Image::resize says what happens to the contents.

#include <cstdint>

#include "qcow/image_spec.h"

namespace qcow {

struct ResizeJob {
    enum class Change : std::uint8_t {
        to,      ///< the size becomes `bytes`
        grow,    ///< the size grows by `bytes`
        shrink,  ///< the size shrinks by `bytes`
    };

    ImageSpec image;  ///< without ImageSpec::write, the defaults of WriteOptions hold
    Change change = Change::to;
    std::uint64_t bytes = 0;
    Image::Shrink shrink = Image::Shrink::refuse;
};

struct ResizeResult {
    std::uint64_t old_size = 0;  ///< bytes
    std::uint64_t new_size = 0;  ///< bytes; whole sectors
};

/// Opens the image, changes its size, and closes it. Uses only `warn` of `control`.
/// Errors: Errc::invalid_argument for a size that no disk can have, and for a smaller size if `shrink` refuses it;
/// those of open_image, Image::resize and Image::close.
QCOW_API Result<ResizeResult> resize(const ResizeJob& job, const JobControl& control = {});

}  // namespace qcow
