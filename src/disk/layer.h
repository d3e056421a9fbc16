#pragma once
// One image of a chain: what it holds itself, and what it leaves to the layers below.

#include <cstdint>
#include <optional>
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
    virtual Result<Part> read_part(GuestOffset at, Buffers to) const = 0;

    /// The extent from `at` on, as far as this layer knows: "unallocated" is what the layer below has.
    [[nodiscard]] virtual Result<Extent> own_extent(GuestOffset at, std::uint64_t limit) const = 0;

    /// Errc::encrypted or not_found where the bytes that it holds are out of reach.
    [[nodiscard]] virtual Result<void> verify_readable() const { return {}; }

    /// The backing file, which is asked for the rest; null where the format has none.
    [[nodiscard]] virtual const BackingFile* backing_file() const { return nullptr; }
    /// See BackingFile::exchange. Only for formats with backing files.
    // NOLINTNEXTLINE(performance-unnecessary-value-param): those that have one move it
    virtual void exchange_backing(std::shared_ptr<Layer>) {}

protected:
    // Writing. How an image behaves that is open for writing is the same for every format, and is seen to here.

    /// From now on the image is written with these options; nothing: it is not written any more. No request may be in
    /// flight.
    void write_with(std::optional<WriteOptions> options) { write_ = options; }
    [[nodiscard]] const std::optional<WriteOptions>& write_options() const { return write_; }

    virtual Result<void> write_data(GuestOffset at, ConstBuffers from);
    virtual Result<void> zero(GuestOffset at, std::uint64_t length, Zeroes zeroes);
    /// Whole blocks, or up to the end of the disk.
    virtual Result<void> drop(GuestOffset at, std::uint64_t length);
    virtual Result<void> write_compressed_data(GuestOffset at, std::span<const std::byte> from,
                                               std::optional<int> level);

    [[nodiscard]] Result<void> verify_writable() const final;
    Result<void> do_write(GuestOffset at, ConstBuffers from) final;
    Result<void> do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes) final;
    Result<void> do_discard(GuestOffset at, std::uint64_t length) final;
    Result<void> do_write_compressed(GuestOffset at, std::span<const std::byte> from, std::optional<int> level) final;

private:
    Result<void> write_detecting_zeroes(GuestOffset at, ConstBuffers from);
    Result<void> finish(Result<void> changed);

    std::optional<WriteOptions> write_;
};

}  // namespace qcow
