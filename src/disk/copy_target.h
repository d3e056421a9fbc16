#pragma once
// Where a copy goes: another Disk, or a new image that is written from front to back.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "qcow/disk.h"

namespace qcow {

/// Guest bytes, and what is to become of them.
struct PreparedRun {
    enum class Kind : std::uint8_t {
        nothing,     // the target has them already
        zero,        // to be made zeros
        data,        // to be written as they are
        compressed,  // to be written as the stream that `bytes` is
    };
    Kind kind = Kind::data;
    std::uint64_t length = 0;  // guest bytes
    std::span<const std::byte> bytes = {};
    HostOffset place = {};  // for the target's own use
};

/// A piece of a source's data on its way.
struct Piece {
    GuestOffset at;
    std::span<std::byte> bytes;      // as read
    std::vector<std::byte> scratch;  // for whoever prepares it; kept from piece to piece
    std::vector<PreparedRun> runs;   // in guest order, covering all of it, once prepared
};

class CopyTarget {
public:
    CopyTarget() = default;
    CopyTarget(const CopyTarget&) = delete;
    CopyTarget& operator=(const CopyTarget&) = delete;
    virtual ~CopyTarget() = default;

    /// All that is handed over begins at a multiple of this power of two, and ends at one or at the end of the source.
    [[nodiscard]] virtual std::uint64_t block_size() const = 0;

    /// Decides what becomes of each part of the piece, and compresses it if it is to be. Any number of threads at once.
    virtual Result<void> prepare(Piece& piece) const = 0;

    /// Whether the others may be called in any order and by any number of threads at once. Otherwise they are called by
    /// one thread at a time, in guest order.
    [[nodiscard]] virtual bool any_order() const = 0;

    virtual Result<void> write(Piece& piece) = 0;

    /// Does the rest of the work for a piece that was written: what needs no order, such as encrypting. Any number of
    /// threads at once.
    virtual Result<void> complete(const Piece&) { return {}; }

    /// The source reads as zeros there.
    virtual Result<void> write_zeroes(GuestOffset at, std::uint64_t length) = 0;

    /// Lets the kernel copy. Gives how many bytes were done, from the front, in whole blocks.
    virtual Result<std::uint64_t> copy_from(GuestOffset at, const Storage& source, HostOffset from,
                                            std::uint64_t length) = 0;
};

}  // namespace qcow
