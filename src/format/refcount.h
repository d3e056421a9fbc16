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

/// Sets it; `value` must fit in `1 << order` bits.
inline void set_refcount(std::span<std::byte> block, std::uint64_t index, unsigned order, std::uint64_t value) {
    switch (order) {
        case 3: block[index] = static_cast<std::byte>(value); break;
        case 4: store_be(block, index * 2, static_cast<std::uint16_t>(value)); break;
        case 5: store_be(block, index * 4, static_cast<std::uint32_t>(value)); break;
        case 6: store_be(block, index * 8, value); break;
        default: {
            const unsigned per_byte_bits = 3 - order;
            auto& byte = block[index >> per_byte_bits];
            const auto shift = (index & low_bits(per_byte_bits)) << order;
            const auto mask = static_cast<std::byte>(low_bits(1U << order) << shift);
            byte = (byte & ~mask) | static_cast<std::byte>(value << shift);
        }
    }
}

// The same for a block that is held as 64-bit words in host byte order.

/// Where in its word the refcount at `index` of a block begins, in bits.
constexpr unsigned refcount_shift(std::uint64_t index, unsigned order) {
    const auto i = static_cast<unsigned>(index & low_bits(6 - order));
    if (order >= 3) return 64 - ((i + 1) << order);
    const unsigned byte = i >> (3 - order);
    return 56 - byte * 8 + (static_cast<unsigned>(i & low_bits(3 - order)) << order);
}

constexpr std::uint64_t refcount_mask(unsigned order) { return order == 6 ? ~std::uint64_t{0} : low_bits(1U << order); }

/// `word` is the one of the block's words that has it: the `index >> (6 - order)`-th.
constexpr std::uint64_t refcount_in(std::uint64_t word, std::uint64_t index, unsigned order) {
    return word >> refcount_shift(index, order) & refcount_mask(order);
}

constexpr std::uint64_t with_refcount(std::uint64_t word, std::uint64_t index, unsigned order, std::uint64_t value) {
    const unsigned shift = refcount_shift(index, order);
    return (word & ~(refcount_mask(order) << shift)) | value << shift;
}

/// The largest refcount of `1 << order` bits.
constexpr std::uint64_t max_refcount(unsigned order) { return refcount_mask(order); }

}  // namespace qcow::format
