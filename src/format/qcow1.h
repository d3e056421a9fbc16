#pragma once
// Version 1 of the format, the old "qcow": header and entries. It has no published specification but QEMU's reader.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/bits.h"
#include "format/entries.h"
#include "qcow/error.h"
#include "qcow/offset.h"

namespace qcow::format {

inline constexpr std::size_t qcow1_header_bytes = 48;

struct Qcow1Header {
    std::uint64_t backing_name_offset = 0;
    std::uint32_t backing_name_length = 0;
    std::uint64_t size = 0;
    unsigned cluster_bits = 12;
    unsigned l2_bits = 9;
    bool encrypted = false;
    HostOffset l1_table;

    [[nodiscard]] std::uint64_t cluster_size() const { return bit(cluster_bits); }
    [[nodiscard]] std::uint64_t l2_coverage() const { return bit(cluster_bits + l2_bits); }
    [[nodiscard]] std::uint64_t l1_entries() const { return divide_up(size, l2_coverage()); }
};

Result<Qcow1Header> parse_qcow1_header(std::span<const std::byte> start, std::uint64_t file_size);

struct Qcow1Entry {
    std::uint64_t word = 0;

    [[nodiscard]] bool compressed() const { return (word & bit(63)) != 0; }
    [[nodiscard]] bool allocated() const { return word != 0; }
    [[nodiscard]] HostOffset cluster() const { return {word}; }
    /// Bits 63 - cluster_bits to 62 are the length in bytes, those below the offset.
    [[nodiscard]] CompressedRange compressed_range(unsigned cluster_bits) const {
        const unsigned offset_bits = 63 - cluster_bits;
        return {{word & low_bits(offset_bits)}, word >> offset_bits & low_bits(cluster_bits)};
    }
};

}  // namespace qcow::format
