#pragma once
// Compressing clusters, the other direction of codec.h.

#include <cstddef>
#include <memory>
#include <optional>
#include <span>

#include "qcow/error.h"
#include "qcow/image.h"

namespace qcow::codec {

/// Compresses one cluster after the other. Not thread-safe: each thread has its own.
class Compressor {
public:
    Compressor() = default;
    Compressor(const Compressor&) = delete;
    Compressor& operator=(const Compressor&) = delete;
    virtual ~Compressor() = default;

    /// Compresses `in` into `out`. Gives the length, or 0 where that does not fit: then it is not worth it.
    virtual std::size_t compress(std::span<const std::byte> in, std::span<std::byte> out) = 0;
};

/// A compressor of a level: 1 (fast) to 9 (small) for zlib, 1 to 19 for zstd. Streams of zlib keep their distances
/// within 4 KiB, since readers open them with a window of that size. Levels 1 to 3 are ISA-L's, ten times as fast as
/// zlib's at nearly the same size; the others are zlib's. Errc::invalid_argument for other levels.
Result<std::unique_ptr<Compressor>> make_compressor(Compression compression, std::optional<int> level);

}  // namespace qcow::codec
