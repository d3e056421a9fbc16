#pragma once
// The bitmaps of an image that somebody asks about.

#include <cstddef>
#include <map>
#include <mutex>
#include <string>
#include <string_view>

#include "format/tables.h"
#include "qcow2/metadata/metadata.h"

namespace qcow::qcow2 {

/// Reads the directory when a bitmap is asked for by name for the first time; from then on it is known, and asking
/// costs nothing. What is kept does not change until forget(), except for the marks of the image's own writer, who
/// knows which those are. Thread-safe, except for forget().
class KnownBitmaps {
public:
    struct Known {
        format::BitmapEntry entry;  // in_use: as it was in the file
        std::size_t index = 0;      // in the directory
    };

    explicit KnownBitmaps(const Metadata& metadata) : metadata_(metadata) {}

    /// The bitmap as the directory has it, not verified. Valid until forget(). Errc::not_found, corrupt, io.
    Result<const Known*> find(std::string_view name);

    /// The directory has changed, or the writer is gone, and what it did to the marks is in the file only. Nobody may
    /// be asking.
    void forget() { known_.clear(); }

private:
    const Metadata& metadata_;
    std::mutex mutex_;  // also so that the directory is in memory once, however many ask
    std::map<std::string, Known, std::less<>> known_;
};

}  // namespace qcow::qcow2
