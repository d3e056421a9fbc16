#pragma once
// The part of a rebase that changes the image: see qcow/rebase.h.

#include <optional>
#include <string>

#include "qcow/rebase.h"

namespace qcow {

/// Where an image is to take from what it does not hold.
struct NewBacking {
    Disk* disk;        ///< null: there is none, or RebaseJob::unsafe
    std::string name;  ///< to be recorded; empty: none
    std::optional<Format> format;
};

/// Copies into the image what it takes from its old backing file and what the new one has otherwise, unless
/// RebaseJob::unsafe. Then records the new one, and closes the image. A crash leaves an image with the same contents
/// through the backing file that it records. Of `job`, ImageSpec and the backing file are not used. Returns the bytes
/// that were copied.
Result<std::uint64_t> rebase_image(Image& image, const NewBacking& backing, const RebaseJob& job,
                                   const JobControl& control);

}  // namespace qcow
