#include <fmt/format.h>

#include <algorithm>

#include "base/bits.h"
#include "base/endian.h"
#include "base/try.h"
#include "format/header.h"

namespace qcow::format {
namespace {

constexpr std::size_t header_length_v3 = 112;  // as QEMU writes it: with the compression type, padded

class Encoder {
public:
    template <std::unsigned_integral T>
    void put(T value) {
        bytes_.resize(bytes_.size() + sizeof(T));
        store_be(bytes_, bytes_.size() - sizeof(T), value);
    }

    void put(std::span<const std::byte> bytes) { bytes_.insert(bytes_.end(), bytes.begin(), bytes.end()); }

    void pad_to(std::size_t length) { bytes_.resize(std::max(bytes_.size(), length)); }

    void put_extension(std::uint32_t type, std::span<const std::byte> data) {
        put(type);
        put(static_cast<std::uint32_t>(data.size()));
        put(data);
        pad_to(align_down(bytes_.size() + 7, 8));
    }

    void put_extension(ExtensionType type, std::span<const std::byte> data) {
        put_extension(static_cast<std::uint32_t>(type), data);
    }

    [[nodiscard]] std::size_t size() const { return bytes_.size(); }
    std::vector<std::byte> take() { return std::move(bytes_); }

private:
    std::vector<std::byte> bytes_;
};

std::vector<std::byte> encode_feature_names() {
    constexpr std::size_t name_bytes = 46;
    Encoder out;
    for (const auto& feature : known_features) {
        out.put(static_cast<std::uint8_t>(feature.kind));
        out.put(static_cast<std::uint8_t>(feature.bit));
        const std::size_t end = out.size() + name_bytes;
        out.put(as_bytes(feature.name));
        out.pad_to(end);
    }
    return out.take();
}

void put_fixed_fields(Encoder& out, const Header& h, std::uint64_t backing_offset) {
    out.put(magic);
    out.put(h.version);
    out.put(backing_offset);
    out.put(static_cast<std::uint32_t>(h.backing_name.size()));
    out.put(static_cast<std::uint32_t>(h.cluster_bits));
    out.put(h.size);
    out.put(static_cast<std::uint32_t>(h.crypt));
    out.put(h.l1_entries);
    out.put(h.l1_table.value);
    out.put(h.refcount_table.value);
    out.put(h.refcount_table_clusters);
    out.put(h.snapshot_count);
    out.put(h.snapshot_table.value);
    if (h.version < 3) return;
    out.put(h.incompatible);
    out.put(h.compatible);
    out.put(h.autoclear);
    out.put(static_cast<std::uint32_t>(h.refcount_order));
    out.put(static_cast<std::uint32_t>(header_length_v3));
    out.put(static_cast<std::uint8_t>(h.compression));
    out.pad_to(header_length_v3);
}

std::vector<std::byte> encode_extensions(const Header& h) {
    Encoder out;
    if (h.backing_format) out.put_extension(ExtensionType::backing_format, as_bytes(*h.backing_format));
    if (h.data_file_name) out.put_extension(ExtensionType::data_file_name, as_bytes(*h.data_file_name));
    if (h.encryption) out.put_extension(ExtensionType::encryption, encode_encryption_extension(*h.encryption));
    if (h.bitmaps) out.put_extension(ExtensionType::bitmaps, encode_bitmaps_extension(*h.bitmaps));
    return out.take();
}

}  // namespace

std::vector<std::byte> encode_encryption_extension(const EncryptionExtension& extension) {
    Encoder data;
    data.put(extension.offset.value);
    data.put(extension.length);
    return data.take();
}

std::vector<std::byte> encode_bitmaps_extension(const BitmapsExtension& extension) {
    Encoder data;
    data.put(extension.count);
    data.put(extension.reserved);
    data.put(extension.directory_size);
    data.put(extension.directory.value);
    return data.take();
}

Result<std::vector<std::byte>> encode_header(const Header& h) {
    constexpr std::size_t end_marker = 8;
    const std::size_t fixed = h.version < 3 ? fixed_header_v2 : header_length_v3;
    const auto extensions = encode_extensions(h);
    const auto feature_names = encode_feature_names();
    const std::size_t needed = fixed + extensions.size() + end_marker + h.backing_name.size();
    if (needed > h.cluster_size() || h.backing_name.size() > max_name_length) {
        return fail(Errc::limit_exceeded, "header",
                    fmt::format("with the names that it is to hold it takes {} bytes, more than a cluster of {}; use "
                                "larger clusters or shorter names",
                                needed, h.cluster_size()));
    }
    const std::size_t table = end_marker + feature_names.size();
    const bool has_table = h.version >= 3 && needed + table <= h.cluster_size();

    Encoder out;
    const std::size_t backing_offset = needed - h.backing_name.size() + (has_table ? table : 0);
    put_fixed_fields(out, h, h.backing_name.empty() ? 0 : backing_offset);
    out.put(extensions);
    if (has_table) out.put_extension(ExtensionType::feature_names, feature_names);
    out.put_extension(ExtensionType::end, {});
    out.put(as_bytes(h.backing_name));
    return out.take();
}

void update_header(std::span<std::byte> bytes, unsigned version, const HeaderState& h) {
    store_be(bytes, 24, h.size);
    store_be(bytes, 36, h.l1_entries);
    store_be(bytes, 40, h.l1_table.value);
    store_be(bytes, 48, h.refcount_table.value);
    store_be(bytes, 56, h.refcount_table_clusters);
    store_be(bytes, 60, h.snapshot_count);
    store_be(bytes, 64, h.snapshot_table.value);
    if (version < 3) return;
    store_be(bytes, 72, h.incompatible);
    store_be(bytes, 80, h.compatible);
    store_be(bytes, 88, h.autoclear);
}

}  // namespace qcow::format
