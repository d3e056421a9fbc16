#pragma once
// The backing file of a layer: what the guest sees where the layer itself holds nothing.

#include <memory>
#include <span>
#include <string>

#include "disk/layer.h"

namespace qcow {

/// The backing file of a layer. It may be absent, or shorter than the layer: then there are zeros.
///
/// Chains are long, and a thread's stack is not. So no layer calls the next one: they are asked one after the other
/// here.
///
/// Thread safety: all functions but exchange() may be called from any number of threads.
class BackingFile {
public:
    /// `backing_name` is the image's name for it; empty: it has none. A name without `image`: it was not opened, and
    /// reads that need it fail.
    BackingFile(std::shared_ptr<Layer> image, std::string backing_name)
        : image_(std::move(image)), backing_name_(std::move(backing_name)) {}
    BackingFile(const BackingFile&) = delete;
    BackingFile& operator=(const BackingFile&) = delete;
    ~BackingFile();

    [[nodiscard]] const std::shared_ptr<Layer>& image() const { return image_; }

    /// Puts another image in its place; null: there is none. No request may be in flight.
    void exchange(std::shared_ptr<Layer> image) {
        image_ = std::move(image);
        backing_name_.clear();
    }

    /// Whether there is such a layer, opened or not.
    [[nodiscard]] bool exists() const { return image_ != nullptr || !backing_name_.empty(); }

    /// Guest bytes; zeros past the end of the layer below.
    Result<void> read(GuestOffset at, Buffers to) const;

    /// The extent as seen from the layer above: one deeper. What lies past the end of the layer below is unallocated
    /// in the one above.
    [[nodiscard]] Result<Extent> extent(GuestOffset at, std::uint64_t limit) const;

    /// Whether all that lies below can be read: see Layer::verify_readable.
    [[nodiscard]] Result<void> verify_readable() const;

private:
    [[nodiscard]] std::unexpected<Error> not_opened(GuestOffset at) const;
    Result<Layer::Part> read_part(GuestOffset at, Buffers to) const;

    std::shared_ptr<Layer> image_;
    std::string backing_name_;
};

}  // namespace qcow
