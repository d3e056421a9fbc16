#pragma once
// An unnamed temporary file, for what is too large for memory.

#include <cstdint>
#include <mutex>
#include <span>

#include "storage/file.h"

namespace qcow {

/// The file is made when the first byte is written, in TMPDIR or /var/tmp.
/// Thread safety: reads may run at the same time as reads.
class ScratchFile {
public:
    Result<void> write(std::uint64_t at, std::span<const std::byte> from);
    /// Writes behind all that was written, and returns where that is.
    Result<std::uint64_t> append(std::span<const std::byte> from);
    /// Fills all of `to`. What was never written reads as zeros.
    Result<void> read(std::uint64_t at, std::span<std::byte> to) const;

private:
    Result<void> open();

    FileDescriptor fd_{-1};
    std::uint64_t end_ = 0;
};

}  // namespace qcow
