#pragma once
// Contents for tests.

#include <cstdint>

#include "support/bytes.h"

namespace qcow::test {

/// A number that looks random but is always the same for the same `n`.
inline std::uint64_t scrambled(std::uint64_t n) {
    n = (n + 0x9e37'79b9'7f4a'7c15) * 0xbf58'476d'1ce4'e5b9;
    n = (n ^ n >> 27) * 0x94d0'49bb'1331'11eb;
    return n ^ n >> 31;
}

/// Bytes that compress to about half: runs of repeated and of random ones, as in file systems.
inline Bytes sample(std::size_t size, std::uint64_t seed = 1) {
    Bytes result;
    while (result.size() < size) {
        const auto n = scrambled(seed + result.size());
        const std::size_t length = std::min<std::size_t>(n % 61 + 4, size - result.size());
        for (std::size_t i = 0; i < length; ++i)
            result.push_back(static_cast<std::byte>(n & 1 ? n >> 8 : scrambled(n + i)));
    }
    return result;
}

}  // namespace qcow::test
