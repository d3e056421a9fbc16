#pragma once
// Layers whose bytes lie in one file in the guest's order.

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "base/bits.h"
#include "disk/layer.h"
#include "qcow/storage.h"

namespace qcow {

/// A layer that keeps guest offset x at host offset begin + x of its file.
class FlatLayer : public Layer {
public:
    [[nodiscard]] std::uint64_t size() const override { return size_; }
    [[nodiscard]] std::uint64_t block_size() const override { return 4 * KiB; }
    [[nodiscard]] std::vector<std::string> files() const override { return {storage_->name()}; }

protected:
    FlatLayer(std::shared_ptr<Storage> storage, HostOffset begin, std::uint64_t size, std::optional<WriteOptions> write)
        : storage_(std::move(storage)), begin_(begin), size_(size) {
        write_with(write);
    }

    [[nodiscard]] Storage& storage() const { return *storage_; }
    [[nodiscard]] HostOffset host(GuestOffset at) const { return begin_ + at.value; }

    /// The error of a read that found no bytes in [at, at + length): the file has become shorter since it was opened.
    [[nodiscard]] std::unexpected<Error> was_cut(GuestOffset at, std::uint64_t length) const;

    Result<void> do_read(GuestOffset at, Buffers to) final;
    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) final { return own_extent(at, limit); }
    Result<void> do_resize(std::uint64_t size) override;
    Result<void> do_flush() final;
    Result<void> do_close() final;
    [[nodiscard]] Result<ImageInfo> do_info() const override;

private:
    std::shared_ptr<Storage> storage_;
    HostOffset begin_;
    std::atomic<std::uint64_t> size_;
};

}  // namespace qcow
