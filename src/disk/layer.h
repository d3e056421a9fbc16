#pragma once
// One image of a chain: what it holds itself, and what it leaves to the layers below.

#include <cstdint>
#include <span>

#include "qcow/image.h"

namespace qcow {

class BackingFile;

class Layer : public Image {
public:
    /// The front of a request: at least one byte of it.
    struct Part {
        std::uint64_t length = 0;
        bool held = true;  ///< false: nothing was read, the layer below has it
    };

    /// Reads the front of `to`, not empty and within the disk, where this layer holds it.
    virtual Result<Part> read_part(GuestOffset at, std::span<std::byte> to) const = 0;

    /// The extent from `at` on, as far as this layer knows: "unallocated" is what the layer below has.
    [[nodiscard]] virtual Result<Extent> own_extent(GuestOffset at, std::uint64_t limit) const = 0;

    /// Errc::encrypted or not_found where the bytes that it holds are out of reach.
    [[nodiscard]] virtual Result<void> verify_readable() const { return {}; }

    /// The backing file, which is asked for the rest; null where the format has none.
    [[nodiscard]] virtual const BackingFile* backing_file() const { return nullptr; }
};

}  // namespace qcow
