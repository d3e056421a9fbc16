#pragma once
// What shines through where a layer holds nothing: its backing file, or zeros.

#include <memory>
#include <span>

#include "qcow/image.h"

namespace qcow {

/// The layer below another one, which may be absent, or shorter than what lies on top of it.
class Below {
public:
    /// `named` without `image`: there is a backing file, but it was not opened, and reads that need it fail.
    Below(std::shared_ptr<Image> image, bool named) : image_(std::move(image)), named_(named) {}

    [[nodiscard]] const std::shared_ptr<Image>& image() const { return image_; }

    /// Guest bytes; zeros past the end of the layer below.
    Result<void> read(GuestOffset at, std::span<std::byte> to) const;

    /// The extent as seen from the layer above: one deeper.
    [[nodiscard]] Result<Extent> extent(GuestOffset at, std::uint64_t limit) const;

private:
    std::shared_ptr<Image> image_;
    bool named_;
};

}  // namespace qcow
