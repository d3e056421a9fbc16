#pragma once
// Copying the persistent bitmaps of an image into another one.

#include <memory>
#include <vector>

#include "operation/new_image.h"
#include "qcow/bitmaps.h"

namespace qcow {

/// Returns the actions that copy all bitmaps of `source` into an image whose disk has the same size. Each copy is
/// enabled if the original is. With `skip_broken`, leaves out bitmaps that are damaged or in_use, and warns of them.
/// Errors: Errc::corrupt, unsupported: a bitmap cannot be read; io.
Result<std::vector<BitmapAction>> copies_of_bitmaps(const std::shared_ptr<Image>& source, bool skip_broken,
                                                    Warnings& warnings);

}  // namespace qcow
