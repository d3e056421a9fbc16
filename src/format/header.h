#pragma once
// The qcow2 header, versions 2 and 3, with its extensions: bytes in, checked structure out.
// Source: the published qcow2 specification (QEMU, docs/interop/qcow2), "Header" and "Header extensions".

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "qcow/error.h"
#include "qcow/image.h"
#include "qcow/offset.h"

namespace qcow::format {

inline constexpr std::uint32_t magic = 0x514649fb;  // "QFI\xfb", shared by all versions
inline constexpr std::size_t fixed_header_v2 = 72;
inline constexpr std::size_t fixed_header_v3 = 104;
inline constexpr unsigned min_cluster_bits = 9;
inline constexpr unsigned max_cluster_bits = 21;
inline constexpr std::size_t max_cluster_size = std::size_t{1} << max_cluster_bits;
inline constexpr std::size_t max_name_length = 1023;  // of a backing file
/// Real headers have up to six extensions; a cluster has room for 262,000, in each layer of a chain.
inline constexpr std::size_t max_extensions = 1000;
/// As many as there are feature bits: further entries of the table of their names can say nothing new.
inline constexpr std::size_t max_feature_names = std::size_t{3} * 64;
/// Longer than a path can be.
inline constexpr std::size_t max_data_file_name = 4096;

// Limits beyond the specification's, the same as QEMU's: images past them do not exist in practice.
inline constexpr std::uint64_t max_l1_bytes = std::uint64_t{32} << 20;
inline constexpr std::uint64_t max_refcount_table_bytes = std::uint64_t{8} << 20;
inline constexpr std::uint32_t max_snapshots = 65536;
inline constexpr std::uint32_t max_bitmaps = 65535;
inline constexpr std::uint64_t max_bitmap_bytes = std::uint64_t{512} << 20;  // of the bits of one

namespace incompatible {
inline constexpr std::uint64_t dirty = 1 << 0;
inline constexpr std::uint64_t corrupt = 1 << 1;
inline constexpr std::uint64_t external_data = 1 << 2;
inline constexpr std::uint64_t compression_type = 1 << 3;
inline constexpr std::uint64_t extended_l2 = 1 << 4;
inline constexpr std::uint64_t known = dirty | corrupt | external_data | compression_type | extended_l2;
}  // namespace incompatible

namespace compatible {
inline constexpr std::uint64_t lazy_refcounts = 1 << 0;
}

namespace autoclear {
inline constexpr std::uint64_t bitmaps = 1 << 0;
inline constexpr std::uint64_t raw_external_data = 1 << 1;
}  // namespace autoclear

enum class Crypt : std::uint32_t { none = 0, aes = 1, luks = 2 };

/// A header extension that this library does not know. What it holds stays in the file, which update_header leaves as
/// it is, and takes no memory: a chain has many headers.
struct Extension {
    std::uint32_t type = 0;
    std::uint32_t bytes = 0;
};

/// The types of the extensions that this library knows.
enum class ExtensionType : std::uint32_t {
    end = 0,
    backing_format = 0xe2792aca,
    feature_names = 0x6803f857,
    bitmaps = 0x23852875,
    encryption = 0x0537be77,
    data_file_name = 0x44415441,
};

struct KnownFeature {
    Feature::Kind kind;
    unsigned bit;
    std::string_view name;
};
inline constexpr std::array known_features = {
    KnownFeature{Feature::Kind::incompatible, 0, "dirty"},
    KnownFeature{Feature::Kind::incompatible, 1, "corrupt"},
    KnownFeature{Feature::Kind::incompatible, 2, "external data file"},
    KnownFeature{Feature::Kind::incompatible, 3, "compression type"},
    KnownFeature{Feature::Kind::incompatible, 4, "extended L2 entries"},
    KnownFeature{Feature::Kind::compatible, 0, "lazy refcounts"},
    KnownFeature{Feature::Kind::autoclear, 0, "bitmaps"},
    KnownFeature{Feature::Kind::autoclear, 1, "raw external data"},
};

struct FeatureName {
    std::uint8_t kind = 0;  // 0 incompatible, 1 compatible, 2 autoclear
    std::uint8_t bit = 0;
    std::string name;
};

struct BitmapsExtension {
    std::uint32_t count = 0;
    std::uint32_t reserved = 0;  // to be 0
    std::uint64_t directory_size = 0;
    HostOffset directory;
};

struct EncryptionExtension {
    HostOffset offset;
    std::uint64_t length = 0;
};

/// What changes in an image's life; cheap to copy.
struct HeaderState {
    std::uint64_t size = 0;  // virtual, bytes
    std::uint32_t l1_entries = 0;
    HostOffset l1_table;
    HostOffset refcount_table;
    std::uint32_t refcount_table_clusters = 0;
    std::uint32_t snapshot_count = 0;
    HostOffset snapshot_table;
    std::uint64_t incompatible = 0;
    std::uint64_t compatible = 0;
    std::uint64_t autoclear = 0;
    std::optional<BitmapsExtension> bitmaps;

    [[nodiscard]] bool has(std::uint64_t incompatible_bit) const { return (incompatible & incompatible_bit) != 0; }
    /// Whether the bitmaps extension may be believed.
    [[nodiscard]] bool bitmaps_consistent() const { return bitmaps && (autoclear & autoclear::bitmaps) != 0; }
};

/// What never changes while an image is open.
struct FixedHeader {
    std::uint32_t version = 3;
    unsigned cluster_bits = 16;
    Crypt crypt = Crypt::none;
    unsigned refcount_order = 4;
    std::uint32_t header_length = fixed_header_v2;
    Compression compression = Compression::zlib;

    std::string backing_name;  // empty: none
    std::optional<std::string> backing_format;
    std::optional<std::string> data_file_name;
    std::vector<FeatureName> feature_names;
    std::optional<EncryptionExtension> encryption;
    std::vector<Extension> unknown_extensions;

    [[nodiscard]] std::uint64_t cluster_size() const { return std::uint64_t{1} << cluster_bits; }
};

/// A header as a whole, as it is parsed and encoded.
struct Header : FixedHeader, HeaderState {};

/// How many bytes parse_header wants to see, from the first `fixed_header_v2` bytes: the first cluster.
Result<std::size_t> header_bytes(std::span<const std::byte> start);

/// Parses and verifies the header, from the image's first cluster or as much of it as the file has. Everything is
/// checked that can be checked without the file and that reading needs: ranges, alignment, limits, unknown incompatible
/// features. The L1 table may lie past the end of the file.
Result<Header> parse_header(std::span<const std::byte> cluster);

/// Verifies that the image may be written: Errc::corrupt if it is marked as corrupt.
Result<void> verify_not_marked_corrupt(const HeaderState& header);

/// What writing and checking need, and reading does not: a refcount table, within the limits and the file.
Result<void> verify_refcount_table(const HeaderState& header, unsigned cluster_bits, std::uint64_t file_size);

/// What snapshots need: that their table begins within the file, and that there are not too many.
Result<void> verify_snapshot_table(const HeaderState& header, unsigned cluster_bits, std::uint64_t file_size);

/// The first cluster's contents, as long as they are, for a header that parse_header would accept, without the
/// extensions that are not known. A table of the
/// feature names is added where there is room for it. Errc::limit_exceeded if header, extensions and backing file name
/// do not fit in a cluster.
Result<std::vector<std::byte>> encode_header(const Header& header);

/// Return the contents of header extensions.
std::vector<std::byte> encode_bitmaps_extension(const BitmapsExtension& extension);
std::vector<std::byte> encode_encryption_extension(const EncryptionExtension& extension);

/// Puts the fields that change in an image's life (size, tables, snapshots, feature bits) into its first bytes, at
/// least the fixed header of its version. Everything else, known or not, stays as it is.
void update_header(std::span<std::byte> first_bytes, unsigned version, const HeaderState& state);

/// The feature bits that are set in `state`, by the names that the header has for them, for people.
std::vector<Feature> features_of(const FixedHeader& header, const HeaderState& state);

}  // namespace qcow::format
