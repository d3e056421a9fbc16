#pragma once
// What all jobs share: progress, cancellation and warnings.

#include <cstdint>
#include <functional>
#include <optional>
#include <stop_token>
#include <string>

#include "qcow/format.h"

namespace qcow {

/// Something that a person should know, but no error.
struct Warning {
    enum class Kind : std::uint8_t {
        odd_image,         ///< an image, or a file that it names, is odd but not wrong
        guessed_format,    ///< the format of an image that is written was guessed, and a guest can change that
        misleading_name,   ///< the name of a new file promises another format
        written_in_place,  ///< a file cannot be replaced: it loses its contents before the new ones are complete
        rounded_size,      ///< the size was rounded up to whole sectors
    };
    Kind kind = Kind::odd_image;
    std::string message;                ///< one line of printable text that begins with the path
    std::optional<Format> format = {};  ///< naming this format avoids the warning
};

using Warn = std::function<void(const Warning&)>;

/// How a caller follows a job and cancels it. While the job runs, its threads call these functions, one at a time. They
/// must not throw.
struct JobControl {
    /// Receives the bytes done and the bytes in total. Each job says which bytes it counts.
    std::function<void(std::uint64_t done, std::uint64_t total)> progress = {};
    /// Receives each warning as it arises. Used by jobs that open images or make files.
    Warn warn = {};
    /// A request to stop makes the job fail with Errc::cancelled when its current pieces are done. A piece is a few MiB
    /// of data, or 1 GiB of zeros or of data that the kernel copies (1/65536 of a disk larger than 64 TiB). A flush is
    /// not interrupted. A stop may be requested from any thread.
    std::stop_token stop = {};
};

}  // namespace qcow
