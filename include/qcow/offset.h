#pragma once
// Offsets in the virtual disk and in files, as different types.

#include <compare>
#include <cstdint>

namespace qcow {

/// A position in bytes. Offsets of different spaces cannot be compared or subtracted.
template <class Space>
struct Offset {
    std::uint64_t value = 0;

    friend constexpr auto operator<=>(Offset, Offset) = default;
    friend constexpr Offset operator+(Offset at, std::uint64_t bytes) { return {at.value + bytes}; }
    friend constexpr std::uint64_t operator-(Offset end, Offset begin) { return end.value - begin.value; }
    constexpr Offset& operator+=(std::uint64_t bytes) {
        value += bytes;
        return *this;
    }
};

/// A position in the virtual disk, as the guest sees it.
using GuestOffset = Offset<struct GuestSpace>;

/// A position in a Storage: an image file or a data file.
using HostOffset = Offset<struct HostSpace>;

/// A run of guest bytes.
struct GuestRange {
    GuestOffset start = {};
    std::uint64_t length = 0;  ///< bytes
};

}  // namespace qcow
