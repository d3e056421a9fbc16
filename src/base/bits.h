#pragma once
// Arithmetic on offsets and sizes that cannot overflow unnoticed.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace qcow {

constexpr std::uint64_t KiB = 1024;
constexpr std::uint64_t MiB = 1024 * KiB;
constexpr std::uint64_t GiB = 1024 * MiB;

constexpr std::uint64_t bit(unsigned n) { return std::uint64_t{1} << n; }

/// The lowest `n` bits set; n < 64.
constexpr std::uint64_t low_bits(unsigned n) { return bit(n) - 1; }

constexpr bool is_aligned(std::uint64_t value, std::uint64_t power_of_two) { return (value & (power_of_two - 1)) == 0; }
constexpr std::uint64_t align_down(std::uint64_t value, std::uint64_t power_of_two) {
    return value & ~(power_of_two - 1);
}

/// How many units of `unit` bytes `value` bytes take; no overflow for any value.
constexpr std::uint64_t divide_up(std::uint64_t value, std::uint64_t unit) {
    return value / unit + (value % unit != 0);
}

/// Whether [begin, begin + length) lies within [0, end), without overflow.
constexpr bool lies_within(std::uint64_t begin, std::uint64_t length, std::uint64_t end) {
    return begin <= end && length <= end - begin;
}

inline std::span<const std::byte> as_bytes(std::string_view text) { return std::as_bytes(std::span(text)); }
inline std::string_view as_text(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// Whether every byte is zero.
bool is_zero(std::span<const std::byte> bytes);

}  // namespace qcow
