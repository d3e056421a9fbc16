#pragma once
// A disk that gets another virtual size.

#include <cstdint>
#include <mutex>

#include "qcow2/dirty_bitmaps.h"
#include "qcow2/zeroing.h"

namespace qcow::qcow2 {

/// Thread safety: one thread at a time. Requests up to the smaller of both sizes may be in flight.
class Resizing {
public:
    /// All outlive it.
    Resizing(WritableMetadata& metadata, ImageParts& parts, ActiveMapping& mapping, Zeroing& zeroing,
             DirtyBitmaps& bitmaps)
        : metadata_(metadata), parts_(parts), mapping_(mapping), zeroing_(zeroing), bitmaps_(bitmaps) {}

    /// Errors: Errc::unsupported, invalid_argument: why the disk cannot get this size.
    [[nodiscard]] Result<void> verify(std::uint64_t size) const;

    /// Makes the disk this large. After an error Metadata::disk_size() tells which size it has. Errors: Errc::no_space,
    /// io, corrupt, limit_exceeded.
    Result<void> resize(std::uint64_t size);

private:
    Result<void> grow(std::uint64_t old_size, std::uint64_t size);
    Result<void> zero_new_bytes(std::uint64_t old_size, std::uint64_t size, std::uint64_t old_tables_end);
    Result<void> shrink(std::uint64_t old_size, std::uint64_t size);
    Result<void> set_header_size(std::uint64_t size);

    WritableMetadata& metadata_;
    ImageParts& parts_;
    ActiveMapping& mapping_;
    Zeroing& zeroing_;
    DirtyBitmaps& bitmaps_;
};

}  // namespace qcow::qcow2
