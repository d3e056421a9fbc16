#pragma once
// The guest's data in compressed clusters.

#include <optional>
#include <span>

#include "codec/compressor.h"
#include "qcow2/copy_on_write.h"

namespace qcow::qcow2 {

/// Thread safety: all functions may be called from any number of threads.
class CompressedWrites {
public:
    /// All outlive it.
    CompressedWrites(WritableMetadata& metadata, ActiveMapping& mapping, CopyOnWrite& writes)
        : metadata_(metadata), mapping_(mapping), writes_(writes) {}

    /// Errors: Errc::invalid_argument where the range is not whole clusters, or ends with the disk; unsupported.
    [[nodiscard]] Result<void> verify(GuestOffset at, std::uint64_t length) const;

    /// Compresses and writes clusters of a verified range. What does not become smaller is stored as it is. Errors:
    /// Errc::no_space, io, corrupt.
    Result<void> write(GuestOffset at, std::span<const std::byte> from, codec::Compressor& compressor);

private:
    Result<bool> write_cluster(GuestOffset at, std::span<const std::byte> from, codec::Compressor& compressor);

    WritableMetadata& metadata_;
    ActiveMapping& mapping_;
    CopyOnWrite& writes_;
};

}  // namespace qcow::qcow2
