#pragma once
// What shines through where a layer holds nothing: its backing file, or zeros.

#include <memory>
#include <span>
#include <string>

#include "qcow/image.h"

namespace qcow {

/// The layer below another one, which may be absent, or shorter than what lies on top of it.
class Below {
public:
    /// `backing_name` is the image's name for it; empty: it has none. A name without `image`: it was not opened, and
    /// reads that need it fail.
    Below(std::shared_ptr<Image> image, std::string backing_name)
        : image_(std::move(image)), backing_name_(std::move(backing_name)) {}

    [[nodiscard]] const std::shared_ptr<Image>& image() const { return image_; }

    /// Whether there is such a layer, opened or not.
    [[nodiscard]] bool exists() const { return image_ != nullptr || !backing_name_.empty(); }

    /// Guest bytes; zeros past the end of the layer below.
    Result<void> read(GuestOffset at, std::span<std::byte> to) const;

    /// The extent as seen from the layer above: one deeper.
    [[nodiscard]] Result<Extent> extent(GuestOffset at, std::uint64_t limit) const;

private:
    [[nodiscard]] std::unexpected<Error> not_opened(GuestOffset at) const;

    std::shared_ptr<Image> image_;
    std::string backing_name_;
};

}  // namespace qcow
