#include <algorithm>
#include <iterator>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/bits.h"
#include "base/endian.h"
#include "format/entries.h"
#include "format/file_name.h"
#include "format/header.h"
#include "format/luks.h"
#include "format/qcow1.h"
#include "format/tables.h"
#include "fuzz/inputs.h"
#include "fuzz/require.h"
#include "qcow/text.h"

namespace qcow::fuzz {
namespace {

std::string_view text(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// What was understood of a header is what is written of it, and read again.
void encode(const format::Header& header) {
    const auto encoded = format::encode_header(header);
    if (!succeeded(encoded)) return;
    const auto again = format::parse_header(*encoded);
    QCOW_REQUIRE(succeeded(again));
    QCOW_REQUIRE(again->version == header.version && again->cluster_bits == header.cluster_bits);
    QCOW_REQUIRE(again->size == header.size && again->crypt == header.crypt);
    QCOW_REQUIRE(again->l1_table == header.l1_table && again->l1_entries == header.l1_entries);
    QCOW_REQUIRE(again->refcount_table == header.refcount_table && again->refcount_order == header.refcount_order);
    QCOW_REQUIRE(again->refcount_table_clusters == header.refcount_table_clusters);
    QCOW_REQUIRE(again->snapshot_table == header.snapshot_table && again->snapshot_count == header.snapshot_count);
    QCOW_REQUIRE(again->incompatible == header.incompatible && again->compatible == header.compatible);
    QCOW_REQUIRE(again->autoclear == header.autoclear && again->compression == header.compression);
    QCOW_REQUIRE(again->backing_name == header.backing_name && again->backing_format == header.backing_format);
    QCOW_REQUIRE(again->data_file_name == header.data_file_name);
    QCOW_REQUIRE(again->bitmaps.has_value() == header.bitmaps.has_value());
    QCOW_REQUIRE(!header.bitmaps || again->bitmaps->directory == header.bitmaps->directory);
    QCOW_REQUIRE(again->encryption.has_value() == header.encryption.has_value());
    QCOW_REQUIRE(again->unknown_extensions.empty());
}

/// Changing the fields that change leaves all others.
void update(std::span<const std::byte> in, const format::Header& header) {
    std::vector<std::byte> bytes(in.begin(), in.end());
    format::update_header(bytes, header.version, header);
    QCOW_REQUIRE(std::ranges::equal(bytes, in));
}

void header(std::span<const std::byte> in, std::uint64_t file_size) {
    const auto bytes = format::header_bytes(in);
    if (!succeeded(bytes)) return;
    QCOW_REQUIRE(*bytes >= 512 && *bytes <= format::max_cluster_size);
    const auto header = format::parse_header(in);
    if (!succeeded(header)) return;
    QCOW_REQUIRE(header->backing_name.size() <= format::max_name_length);
    QCOW_REQUIRE(std::uint64_t{header->l1_entries} * 8 <= format::max_l1_bytes);
    const format::Geometry geometry(*header);
    QCOW_REQUIRE(header->size == 0 || geometry.l1_index({header->size - 1}) < header->l1_entries);
    QCOW_REQUIRE(header->l1_entries == 0 ||
                 lies_within(header->l1_table.value, std::uint64_t{header->l1_entries} * 8, format::max_host_offset));
    if (succeeded(format::verify_refcount_table(*header, header->cluster_bits, file_size))) {
        QCOW_REQUIRE(header->refcount_table_clusters != 0);
        QCOW_REQUIRE(lies_within(header->refcount_table.value,
                                 std::uint64_t{header->refcount_table_clusters} << header->cluster_bits, file_size));
    }
    if (succeeded(format::verify_snapshot_table(*header, header->cluster_bits, file_size)))
        QCOW_REQUIRE(header->snapshot_count == 0 || header->snapshot_table.value < file_size);
    for (const auto& feature : format::features_of(*header, *header)) {
        QCOW_REQUIRE(!feature.name.empty());
        QCOW_REQUIRE(feature.known || feature.kind != Feature::Kind::incompatible);
    }
    encode(*header);
    update(in, *header);
}

void tables(std::span<const std::byte> in, unsigned version) {
    for (auto rest = in; !rest.empty();) {
        const auto entry = format::parse_snapshot(rest, version, GiB);
        if (!succeeded(entry)) break;
        QCOW_REQUIRE(entry->encoded_bytes >= 40 && entry->encoded_bytes <= rest.size());
        rest = rest.subspan(entry->encoded_bytes);
    }
    for (auto rest = in; !rest.empty();) {
        const auto entry = format::parse_bitmap(rest);
        if (!succeeded(entry)) break;
        QCOW_REQUIRE(entry->encoded_bytes >= 24 && entry->encoded_bytes <= rest.size());
        QCOW_REQUIRE(entry->info.granularity != 0);
        rest = rest.subspan(entry->encoded_bytes);
    }
}

/// Every entry of a table, under every rule: runs move on, and never past their cluster.
void entries(std::span<const std::byte> in) {
    for (; in.size() >= 16; in = in.subspan(16)) {
        const format::L2Entry entry{load_be<std::uint64_t>(in, 0), load_be<std::uint64_t>(in, 8)};
        for (const unsigned cluster_bits : {9U, 14U, 16U, 21U}) {
            const auto range = entry.compressed_range(cluster_bits);
            QCOW_REQUIRE(range.length > 0 && range.length <= 2 * bit(cluster_bits));
            for (const unsigned variant : {0U, 1U, 2U, 3U, 4U}) {
                format::EntryRules rules;
                rules.geometry.cluster_bits = cluster_bits;
                rules.geometry.extended_l2 = (variant & 1) != 0 && cluster_bits >= 14;
                rules.external_data = (variant & 2) != 0;
                rules.version = variant == 4 ? 2 : 3;
                static_cast<void>(rules.flaw(entry, {}));
                const unsigned parts = rules.geometry.extended_l2 ? 32 : 1;
                for (unsigned i = 0; i < parts;) {
                    const auto run = rules.run(entry, i);
                    QCOW_REQUIRE(run.count > 0 && run.count <= parts - i);
                    i += run.count;
                }
            }
        }
    }
}

void file_name(std::string_view name) {
    const auto parsed = format::parse_file_name(name);
    if (succeeded(parsed)) {
        QCOW_REQUIRE(!parsed->path.empty() && parsed->path.find('\0') == std::string::npos);
        const bool absolute = parsed->path.starts_with('/');
        for (const std::string from : {"some/where/image.qcow2", "image", "/some/where/image", "../a:b/image", ""}) {
            const auto resolved = format::resolve(parsed->path, from);
            QCOW_REQUIRE(resolved.ends_with(parsed->path));
            QCOW_REQUIRE(resolved.starts_with('/') == (absolute || from.starts_with('/')));
            // Nothing but the directory of the image comes before it.
            const auto directory = absolute ? "" : from.substr(0, from.rfind('/') + 1);
            QCOW_REQUIRE(resolved == directory + parsed->path);
        }
    }
    const auto shown = printable(name);
    QCOW_REQUIRE(printable(shown) == shown);
    QCOW_REQUIRE(std::ranges::none_of(shown, [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }));
}

void qcow1(std::span<const std::byte> in, std::uint64_t file_size) {
    const auto header = format::parse_qcow1_header(in, file_size);
    if (!succeeded(header)) return;
    QCOW_REQUIRE(header->l1_entries() * 8 <= format::max_l1_bytes);
    QCOW_REQUIRE(header->l1_entries() == 0 ||
                 lies_within(header->l1_table.value, header->l1_entries() * 8, format::max_host_offset));
}

/// Key materials of a header that is accepted lie behind it, in the file, apart from each other.
void luks_header(std::span<const std::byte> in, std::uint64_t area_bytes) {
    const auto parsed = format::parse_luks1_header(in);
    if (!succeeded(parsed) || !succeeded(format::verify_luks1(*parsed, area_bytes))) return;
    std::map<std::uint64_t, std::uint64_t> places;
    for (const auto& slot : parsed->slots) {
        const std::uint64_t begin = std::uint64_t{slot.material_sector} * format::luks_sector_bytes;
        const std::uint64_t end = begin + parsed->material_bytes();
        QCOW_REQUIRE(begin >= format::luks1_header_bytes && end <= area_bytes);
        places[begin] = end;
    }
    QCOW_REQUIRE(places.size() == parsed->slots.size());
    for (auto place = places.begin(); std::next(place) != places.end(); ++place)
        QCOW_REQUIRE(place->second <= std::next(place)->first);
    const auto again = format::parse_luks1_header(format::encode_luks1_header(*parsed));
    QCOW_REQUIRE(again && again->key_bytes == parsed->key_bytes && again->salt == parsed->salt);
}

}  // namespace

void run_header_input(std::span<const std::byte> input) {
    if (input.empty()) return;
    const auto selector = static_cast<unsigned>(input[0]);
    const auto in = input.subspan(1);
    // The tables that a header names lie in a file that is larger than the header; how much, the selector says.
    const std::uint64_t file_size = (selector & 0x80) != 0 ? bit(62) : in.size() + ((selector & 0x40) != 0 ? GiB : 0);
    switch (selector & 7) {
        case 0: header(in, file_size); break;
        case 1: tables(in, (selector & 8) != 0 ? 2 : 3); break;
        case 2: entries(in); break;
        case 3: file_name((selector & 8) != 0 ? "file:" + std::string(text(in)) : std::string(text(in))); break;
        case 4: file_name("json:" + std::string(text(in))); break;
        case 5: qcow1(in, file_size); break;
        default: luks_header(in, file_size);
    }
}

}  // namespace qcow::fuzz
