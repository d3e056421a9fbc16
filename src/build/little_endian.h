#pragma once

#include <concepts>
#include <cstddef>
#include <span>

namespace qcow {

/// Stores a little-endian number at byte `at`.
template <std::unsigned_integral T>
void store_le(std::span<std::byte> bytes, std::size_t at, T value) {
    for (std::size_t i = 0; i < sizeof(T); ++i) bytes[at + i] = static_cast<std::byte>(value >> (8 * i) & 0xff);
}

}  // namespace qcow
