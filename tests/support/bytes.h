#pragma once
// Literal bytes for tests. Numbers are spelled out byte by byte, so that they do not lean on the code under test.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string_view>
#include <vector>

namespace qcow::test {

using Bytes = std::vector<std::byte>;

inline Bytes bytes(std::initializer_list<std::uint8_t> values) {
    Bytes result;
    for (const auto value : values) result.push_back(std::byte{value});
    return result;
}

inline Bytes repeated(std::size_t count, std::uint8_t value) { return Bytes(count, std::byte{value}); }

inline Bytes text_bytes(std::string_view text) {
    Bytes result;
    for (const char c : text) result.push_back(static_cast<std::byte>(c));
    return result;
}

/// The low `width` bytes of `value`, the most significant one first.
inline Bytes big_endian_bytes(std::uint64_t value, unsigned width) {
    Bytes result;
    for (unsigned i = width; i-- > 0;) result.push_back(static_cast<std::byte>(value >> (8 * i) & 0xff));
    return result;
}
inline Bytes u8(std::uint8_t value) { return big_endian_bytes(value, 1); }
inline Bytes u16(std::uint16_t value) { return big_endian_bytes(value, 2); }
inline Bytes u32(std::uint32_t value) { return big_endian_bytes(value, 4); }
inline Bytes u64(std::uint64_t value) { return big_endian_bytes(value, 8); }

inline Bytes joined(std::initializer_list<Bytes> parts) {
    Bytes result;
    for (const auto& part : parts) result.insert(result.end(), part.begin(), part.end());
    return result;
}

/// `in` with `patch` written over it at byte `at`.
inline Bytes with(Bytes in, std::size_t at, std::span<const std::byte> patch) {
    std::ranges::copy(patch, std::span(in).subspan(at, patch.size()).begin());
    return in;
}
inline Bytes with_u8(Bytes in, std::size_t at, std::uint8_t value) { return with(std::move(in), at, u8(value)); }
inline Bytes with_u16(Bytes in, std::size_t at, std::uint16_t value) { return with(std::move(in), at, u16(value)); }
inline Bytes with_u32(Bytes in, std::size_t at, std::uint32_t value) { return with(std::move(in), at, u32(value)); }
inline Bytes with_u64(Bytes in, std::size_t at, std::uint64_t value) { return with(std::move(in), at, u64(value)); }

/// The first `count` bytes of `in`.
inline Bytes first(const Bytes& in, std::size_t count) { return {in.begin(), in.begin() + static_cast<long>(count)}; }

}  // namespace qcow::test
