#pragma once
// Refcounts: numbers of 1 to 64 bits in blocks, found through a table.
// Source: the qcow2 specification, "Host cluster management".

#include <cstdint>
#include <span>

#include "base/bits.h"
#include "base/endian.h"
#include "qcow/offset.h"

namespace qcow::format {

struct RefcountTableEntry {
    std::uint64_t word = 0;
    [[nodiscard]] HostOffset block() const { return {word & ~low_bits(9)}; }
    [[nodiscard]] bool allocated() const { return block().value != 0; }
    [[nodiscard]] bool reserved_bits_set() const { return (word & low_bits(9)) != 0; }
};

/// How many refcounts a block holds; its size in bits is `1 << order` each.
constexpr std::uint64_t refcounts_per_block(unsigned cluster_bits, unsigned order) {
    return bit(cluster_bits + 3 - order);
}

/// The refcount at `index` of a block. Below 8 bits they are packed from the least significant bit of each byte.
inline std::uint64_t refcount_at(std::span<const std::byte> block, std::uint64_t index, unsigned order) {
    switch (order) {
        case 3: return static_cast<std::uint8_t>(block[index]);
        case 4: return load_be<std::uint16_t>(block, index * 2);
        case 5: return load_be<std::uint32_t>(block, index * 4);
        case 6: return load_be<std::uint64_t>(block, index * 8);
        default: {
            const unsigned per_byte_bits = 3 - order;
            const auto byte = static_cast<std::uint8_t>(block[index >> per_byte_bits]);
            const auto shift = (index & low_bits(per_byte_bits)) << order;
            return byte >> shift & low_bits(1U << order);
        }
    }
}

}  // namespace qcow::format
