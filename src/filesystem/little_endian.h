#pragma once
// Little-endian numbers in spans of bytes.

#include "base/endian.h"

namespace qcow {

/// The number at byte `at`, which must lie within `bytes` with its whole width.
template <std::unsigned_integral T>
T load_le(std::span<const std::byte> bytes, std::size_t at) {
    const T value = load_be<T>(bytes, at);
    if constexpr (sizeof(T) == 1) {
        return value;
    } else {
        return std::byteswap(value);
    }
}

/// Stores a number at byte `at`, where `bytes` must have room for its whole width.
template <std::unsigned_integral T>
void store_le(std::span<std::byte> bytes, std::size_t at, T value) {
    for (std::size_t i = 0; i < sizeof(T); ++i) bytes[at + i] = static_cast<std::byte>(value >> (8 * i) & 0xff);
}

}  // namespace qcow
