#pragma once
// The part of a commit that changes images: see qcow/commit.h.

#include <optional>
#include <string>

#include "qcow/commit.h"

namespace qcow {

/// The images of a commit, open.
struct CommitImages {
    Image& top;          ///< reads the layers above the base, and nothing below them; writable unless CommitJob::keep
    std::size_t layers;  ///< above the base, `top` included
    Image& base;         ///< writable
    std::optional<std::string> new_name;  ///< the base is recorded under this name as the backing file of `top`
};

/// Makes the base as large as the disk, writes into it what the layers above hold, and closes it. Then empties and
/// closes `top`, unless CommitJob::keep. The disk that `top` has through the base holds the same at every moment, after
/// a crash, too. Of `job`, ImageSpec and `base` are not used. Returns the bytes that were written.
Result<std::uint64_t> commit_layers(const CommitImages& images, const CommitJob& job, const JobControl& control);

}  // namespace qcow
