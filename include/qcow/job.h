#pragma once
// What all jobs have in common: their progress, their cancellation, their warnings.

#include <cstdint>
#include <functional>
#include <optional>
#include <stop_token>
#include <string>

#include "qcow/format.h"

namespace qcow {

/// Something that a person should know, and that is no error.
struct Warning {
    enum class Kind : std::uint8_t {
        odd_image,         ///< an image, or what it names, is odd but not wrong
        guessed_format,    ///< the format of an image that is written was guessed, and a guest can change the guess
        misleading_name,   ///< a new file gets another format than its name says
        written_in_place,  ///< a file that cannot be replaced loses its contents before the new ones are complete
        rounded_size,      ///< a size that was asked for was rounded up to whole sectors
    };
    Kind kind = Kind::odd_image;
    std::string message;                ///< one line of printable text, which begins with the path
    std::optional<Format> format = {};  ///< a caller who names this format gets no such warning
};

using Warn = std::function<void(const Warning&)>;

/// How the caller of a job follows it and ends it early. The functions are called by one thread at a time, which need
/// not be the caller's, while the job runs. They must not throw.
struct JobControl {
    /// Told how many bytes of how many are done. What kind of bytes they are is said at each job.
    std::function<void(std::uint64_t done, std::uint64_t total)> progress = {};
    /// Told each warning when it arises, by jobs that open images or make files.
    Warn warn = {};
    /// Once it is requested to stop, the job fails with Errc::cancelled as soon as its current pieces are done: each is
    /// a request for a few MiB of data, or for 1 GiB of zeros or of data that the kernel copies (on disks of more than
    /// 64 TiB: for 1/65536 of the disk). A flush is not interrupted. Safe to request from any thread.
    std::stop_token stop = {};
};

}  // namespace qcow
