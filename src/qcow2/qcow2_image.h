#pragma once
// qcow2, versions 2 and 3, as an Image.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "disk/pending_image.h"

namespace qcow::qcow2 {

/// Reads and verifies the header.
Result<std::unique_ptr<PendingImage>> begin(std::shared_ptr<Storage> storage);

/// Gives the snapshots of an image that begin() has opened for writing the extra data that version 3 requires.
Result<void> complete_snapshots(Image& image);

/// Replaces the zero clusters of the disk of an image that begin() has opened for writing: by holes where the backing
/// file has no data, and by data clusters with zeros elsewhere. Its snapshots stay.
Result<void> expand_zeroes(Image& image);

/// How bytes are stored: compressed are whole clusters, see Image::write_compressed; zeros are only marked as such.
enum class Stored : std::uint8_t { plain, compressed, zeros };

/// Stores bytes in clusters of the image itself, which begin() has opened for writing: `seen`, what a read of the image
/// at `at` has returned, and still would. So the contents of the disk stay, and bitmaps record nothing. `level`: see
/// ConvertOptions. Errors: those of Disk::write.
Result<void> copy_up(Image& image, GuestOffset at, std::span<const std::byte> seen, Stored stored,
                     std::optional<int> level);

}  // namespace qcow::qcow2
