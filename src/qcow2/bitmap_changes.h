#pragma once
// Making, removing, merging and otherwise changing persistent bitmaps.

#include <span>

#include "qcow/bitmaps.h"
#include "qcow2/metadata/change.h"

namespace qcow::qcow2 {

/// Performs the actions, one after the other, in a single change: see Image::change_bitmaps. What changes is written to
/// new clusters: bits, tables, and the directory. When all of it is durable, the header leads to the new directory.
///
/// No request that changes the image is in flight, and DirtyBitmaps have been saved. They are loaded again afterwards.
Result<void> change_bitmaps(WritableMetadata& writable, std::span<const BitmapAction> actions);

}  // namespace qcow::qcow2
