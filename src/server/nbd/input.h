#pragma once
// What a client sends, many messages a system call.

#include <memory>
#include <optional>

#include "server/stream.h"

namespace qcow::nbd {

/// A buffer in front of a Stream. Not thread-safe.
class Input {
public:
    /// Messages, or their parts, are taken in pieces of at most `capacity` bytes.
    Input(Stream& stream, std::size_t capacity);

    /// Bytes that can be taken without waiting.
    [[nodiscard]] std::size_t buffered() const { return end_ - begin_; }

    /// The next `count` bytes, valid until the next call. Returns nothing if the peer left before them.
    std::optional<std::span<const std::byte>> take(std::size_t count);

    /// The next bytes into `to`, all of it. Bytes that are not in the buffer yet go there directly. Returns false if
    /// the peer left before them.
    bool take_into(std::span<std::byte> to);

    /// Leaves bytes out.
    bool skip(std::uint64_t count);

private:
    Stream& stream_;
    std::size_t capacity_;
    std::unique_ptr<std::byte[]> buffer_;
    std::size_t begin_ = 0;
    std::size_t end_ = 0;
};

}  // namespace qcow::nbd
