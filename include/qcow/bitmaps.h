#pragma once
// Changing the persistent bitmaps of an image.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "qcow/image_spec.h"

namespace qcow {

/// One step of a change: see Image::change_bitmaps.
struct BitmapAction {
    /// Errors of all but `add` and `remove`: Errc::corrupt: the bitmap is damaged, or in_use; Errc::unsupported: it has
    /// unknown extra data. Errors of all but `add`: Errc::not_found.
    enum class Kind : std::uint8_t {
        /// Makes an enabled bitmap without dirty bits. Errors: Errc::invalid_argument for a name that exists or has not
        /// 1 to 1023 bytes, for a bad granularity, and for a disk of 0 bytes; Errc::limit_exceeded: the image has
        /// 65,535
        /// bitmaps, their names fill 16 MiB, or the bitmap would have more than 512 MiB of bits.
        add,
        /// Removes a bitmap, also one that is in_use or damaged.
        remove,
        /// Makes all bits clean.
        clear,
        /// Lets writers record what they change.
        enable,
        /// Keeps the bits as they are.
        disable,
        /// Sets the bits of all bytes that are dirty in another bitmap, of any granularity. Errors: Errc::not_found,
        /// corrupt, unsupported, for the other bitmap, too; Errc::invalid_argument: the disks have different sizes.
        merge,
    };

    Kind kind = Kind::add;
    std::string bitmap;             ///< the name of the bitmap that changes
    std::uint64_t granularity = 0;  ///< of `add`: guest bytes per bit, a power of two from 512 bytes to 2 GiB
                                    ///< 0: the cluster size, but at least 4 KiB and at most 64 KiB
    std::string source = {};        ///< of `merge`: the name of the other bitmap
    std::shared_ptr<Image> source_image = {};  ///< the image that has it; null: the image that changes
};

struct BitmapJob {
    ImageSpec image;  ///< without ImageSpec::write, the defaults of WriteOptions hold
    std::vector<BitmapAction> actions;
    /// The image that has the other bitmaps of `merge`. If set, replaces BitmapAction::source_image.
    std::optional<ImageSpec> source = {};
};

/// Opens the image, changes its bitmaps, and closes it. Uses only `warn` of `control`.
/// Errors: Errc::invalid_argument: the source is the image itself, or depends on it; those of open_image,
/// Image::change_bitmaps and Image::close.
QCOW_API Result<void> change_bitmaps(const BitmapJob& job, const JobControl& control = {});

}  // namespace qcow
