#pragma once
// Big-endian numbers in spans of bytes: the only way in which the formats' numbers are read and written.

#include <bit>
#include <cassert>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace qcow {

/// Reverses the bytes on a little-endian machine: from host order to big-endian, and back.
template <std::unsigned_integral T>
constexpr T big_endian(T value) {
    if constexpr (std::endian::native == std::endian::big || sizeof(T) == 1) {
        return value;
    } else if constexpr (sizeof(T) == 2) {
        return __builtin_bswap16(value);
    } else if constexpr (sizeof(T) == 4) {
        return __builtin_bswap32(value);
    } else {
        return __builtin_bswap64(value);
    }
}

/// The number at byte `at`, which must lie within `bytes` with its whole width.
template <std::unsigned_integral T>
T load_be(std::span<const std::byte> bytes, std::size_t at) {
    assert(at <= bytes.size() && sizeof(T) <= bytes.size() - at);
    T value;
    std::memcpy(&value, bytes.data() + at, sizeof(T));
    return big_endian(value);
}

template <std::unsigned_integral T>
void store_be(std::span<std::byte> bytes, std::size_t at, T value) {
    assert(at <= bytes.size() && sizeof(T) <= bytes.size() - at);
    value = big_endian(value);
    std::memcpy(bytes.data() + at, &value, sizeof(T));
}

}  // namespace qcow
