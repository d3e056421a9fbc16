#pragma once
// Headers of qcow2 images, valid until a test pokes a field.

#include <cstdint>

#include "support/bytes.h"

namespace qcow::test {

/// Where the header's fields lie, as the format's specification numbers them.
namespace field {
inline constexpr std::size_t magic = 0, version = 4, backing_file_offset = 8, backing_file_size = 16, cluster_bits = 20,
                             size = 24, crypt_method = 32, l1_size = 36, l1_table_offset = 40,
                             refcount_table_offset = 48, refcount_table_clusters = 56, nb_snapshots = 60,
                             snapshots_offset = 64, incompatible_features = 72, compatible_features = 80,
                             autoclear_features = 88, refcount_order = 96, header_length = 100, compression_type = 104;
}  // namespace field

/// The length of the file that the headers below are for.
inline constexpr std::uint64_t header_file_size = 8 << 20;

/// The first cluster of a version 2 image: clusters of 64 KiB, and a virtual size of 512 MiB, just as much as its one
/// L1 entry maps. The tables lie at 2 and 4 MiB: aligned whatever the cluster size is made to be.
inline Bytes header_v2() {
    return joined({
        bytes({0x51, 0x46, 0x49, 0xfb}),  // magic
        u32(2),                           // version
        u64(0), u32(0),                   // backing_file_offset, _size
        u32(16),                          // cluster_bits
        u64(512 << 20),                   // size
        u32(0),                           // crypt_method
        u32(1), u64(4 << 20),             // l1_size, l1_table_offset
        u64(2 << 20), u32(1),             // refcount_table_offset, _clusters
        u32(0), u64(0),                   // nb_snapshots, snapshots_offset
        repeated(65536 - 72, 0),          // the rest of the cluster; 0 ends the extensions
    });
}

/// The same in version 3, with the header length that QEMU writes.
inline Bytes header_v3() {
    return with(with_u32(header_v2(), field::version, 3), 72,
                joined({
                    u64(0), u64(0), u64(0),  // incompatible, compatible and autoclear features
                    u32(4), u32(112),        // refcount_order, header_length
                    u64(0),                  // compression_type and padding
                }));
}

/// Where the extensions of header_v3() begin.
inline constexpr std::size_t extensions_v3 = 112;

/// A header extension, padded to a multiple of 8 bytes.
inline Bytes extension(std::uint32_t type, const Bytes& data) {
    return joined(
        {u32(type), u32(static_cast<std::uint32_t>(data.size())), data, repeated((8 - data.size() % 8) % 8, 0)});
}

/// An entry of the feature name table: 48 bytes.
inline Bytes feature_name(std::uint8_t kind, std::uint8_t bit, std::string_view name) {
    return joined({u8(kind), u8(bit), text_bytes(name), repeated(46 - name.size(), 0)});
}

}  // namespace qcow::test
