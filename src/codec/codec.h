#pragma once
// Compressed clusters: a stream in, one cluster of guest bytes out. Pure functions; each thread keeps its own codec
// state.

#include <cstddef>
#include <span>

#include "qcow/error.h"

namespace qcow::codec {

/// Decodes raw deflate (RFC 1951) until `out` is full. What follows the stream is ignored, and so is the rest of a
/// stream that would go on. Errc::corrupt for a damaged stream or one that ends early.
Result<void> inflate(std::span<const std::byte> in, std::span<std::byte> out);

/// The same for Zstandard frames (RFC 8878). Memory stays within a few MiB, whatever window a frame asks for.
Result<void> decompress_zstd(std::span<const std::byte> in, std::span<std::byte> out);

}  // namespace qcow::codec
