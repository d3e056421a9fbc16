#pragma once
// qcow2, versions 2 and 3, as an Image.

#include <memory>

#include "disk/pending_image.h"

namespace qcow::qcow2 {

/// Reads and verifies the header.
Result<std::unique_ptr<PendingImage>> begin(std::shared_ptr<Storage> storage);

/// Gives the snapshots of an image that begin() has opened for writing the extra data that version 3 requires.
Result<void> complete_snapshots(Image& image);

/// Replaces the zero clusters of the disk of an image that begin() has opened for writing: by holes where the backing
/// file has no data, and by data clusters with zeros elsewhere. Its snapshots stay.
Result<void> expand_zeroes(Image& image);

}  // namespace qcow::qcow2
