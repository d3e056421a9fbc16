#pragma once
// Changing the virtual size of an image: the job. See Image::resize for what becomes of the contents.

#include <cstdint>

#include "qcow/image_spec.h"

namespace qcow {

struct ResizeJob {
    enum class Change : std::uint8_t {
        to,      ///< the size becomes `bytes`
        grow,    ///< the size grows by `bytes`
        shrink,  ///< the size shrinks by `bytes`
    };

    ImageSpec image;  ///< ImageSpec::write says how it is written; without it the defaults hold
    Change change = Change::to;
    std::uint64_t bytes = 0;
    Image::Shrink shrink = Image::Shrink::refuse;
};

struct ResizeResult {
    std::uint64_t old_size = 0;  ///< bytes
    std::uint64_t new_size = 0;  ///< bytes, in whole sectors
};

/// Opens the image, changes its size, and closes it. Errors: Errc::invalid_argument for a size that no disk can have,
/// and for a smaller one where `shrink` refuses it; those of open_image, Image::resize and Image::close.
/// Of `control` only `warn` matters.
QCOW_API Result<ResizeResult> resize(const ResizeJob& job, const JobControl& control = {});

}  // namespace qcow
