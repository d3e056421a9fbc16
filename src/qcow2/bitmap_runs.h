#pragma once
// What the bits of a persistent bitmap say.
// Source: the qcow2 specification, "Bitmaps extension".

#include <functional>

#include "base/endian.h"
#include "format/tables.h"
#include "qcow2/metadata/metadata.h"
#include "qcow2/recorded_bits.h"

namespace qcow::qcow2 {

/// Word `index` of the bits in a file, which begin with the lowest bit of the first byte.
inline std::uint64_t load_bits(std::span<const std::byte> bits, std::size_t index) {
    return __builtin_bswap64(load_be<std::uint64_t>(bits, index * 8));
}
inline void store_bits(std::span<std::byte> bits, std::size_t index, std::uint64_t word) {
    store_be(bits, index * 8, std::uint64_t{__builtin_bswap64(word)});
}

/// Errc::corrupt, unsupported: why the bits cannot be read. Looks at the directory's entry, not at the table.
Result<void> verify_bitmap(const Metadata& metadata, const format::BitmapEntry& bitmap);

/// An entry of a verified bitmap's table: for `cluster_size * 8` bits. Errc::corrupt, io.
Result<format::BitmapTableEntry> bitmap_table_entry(const Metadata& metadata, const format::BitmapEntry& bitmap,
                                                    std::uint64_t index);

/// See Image::each_dirty. The bitmap and the range have been verified. `recorded`: null, or a bit for each of the
/// bitmap's.
Result<void> each_dirty_run(const Metadata& metadata, const format::BitmapEntry& bitmap, const RecordedBits* recorded,
                            GuestOffset begin, std::uint64_t length,
                            const std::function<Result<void>(const DirtyRun&)>& visit);

}  // namespace qcow::qcow2
