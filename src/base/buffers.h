#pragma once
// Copies between scatter lists and memory in one piece.

#include <cstring>
#include <vector>

#include "base/bits.h"
#include "qcow/buffers.h"

namespace qcow {

inline void fill_zeros(Buffers to) {
    for (const auto piece : to) std::memset(piece.data(), 0, piece.size());
}

[[nodiscard]] inline bool all_zeros(ConstBuffers from) {
    for (const auto piece : from) {
        if (!is_zero(piece)) return false;
    }
    return true;
}

/// Copies all of `from` to the front of `to`.
inline void gather(ConstBuffers from, std::span<std::byte> to) {
    for (const auto piece : from) {
        std::memcpy(to.data(), piece.data(), piece.size());
        to = to.subspan(piece.size());
    }
}

/// All of `from`, in one piece.
[[nodiscard]] inline std::vector<std::byte> gathered(ConstBuffers from) {
    std::vector<std::byte> bytes(from.size());
    gather(from, bytes);
    return bytes;
}

/// Copies all of `from` to the front of `to`.
inline void scatter(std::span<const std::byte> from, Buffers to) {
    for (const auto piece : to.first(from.size())) {
        std::memcpy(piece.data(), from.data(), piece.size());
        from = from.subspan(piece.size());
    }
}

}  // namespace qcow
