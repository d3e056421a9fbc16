#include "format/header.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/bits.h"
#include "base/endian.h"
#include "base/try.h"
#include "format/entries.h"
#include "format/geometry.h"

namespace qcow::format {
namespace {

std::string field(std::string_view name, std::size_t at) { return fmt::format("header field {} (byte {})", name, at); }

/// The place of a table that the header names: aligned to a cluster, addressable, clear of the header itself.
Result<void> verify_place(std::string_view name, std::size_t at, HostOffset begin, std::uint64_t bytes,
                          unsigned cluster_bits) {
    const auto offset_field = field(fmt::format("{}_offset", name), at);
    if (!is_aligned(begin.value, bit(cluster_bits))) {
        return fail(Errc::corrupt, offset_field,
                    fmt::format("{:#x} is not a multiple of the cluster size", begin.value));
    }
    if (bytes == 0) return {};
    if (!lies_within(begin.value, bytes, max_host_offset))
        return fail(Errc::corrupt, offset_field, fmt::format("{:#x} is more than the format can address", begin.value));
    if (begin.value == 0) return fail(Errc::corrupt, offset_field, "0, which is where the header lies");
    return {};
}

/// The same of a table that has to lie within the file.
Result<void> verify_table(std::string_view name, std::size_t at, HostOffset begin, std::uint64_t bytes,
                          unsigned cluster_bits, std::uint64_t file_size) {
    TRY_VOID(verify_place(name, at, begin, bytes, cluster_bits));
    if (bytes == 0 || lies_within(begin.value, bytes, file_size)) return {};
    return fail(Errc::corrupt, field(fmt::format("{}_offset", name), at),
                fmt::format("a table of {} bytes at {:#x} reaches past the end of the file ({} bytes)", bytes,
                            begin.value, file_size));
}

Result<void> parse_version3(std::span<const std::byte> in, Header& h) {
    if (in.size() < fixed_header_v3) {
        return fail(Errc::corrupt, "header",
                    fmt::format("the file ends within the version 3 header, after {} bytes", in.size()));
    }
    h.incompatible = load_be<std::uint64_t>(in, 72);
    h.compatible = load_be<std::uint64_t>(in, 80);
    h.autoclear = load_be<std::uint64_t>(in, 88);
    const auto refcount_order = load_be<std::uint32_t>(in, 96);
    if (refcount_order > 6) {
        return fail(Errc::corrupt, field("refcount_order", 96), fmt::format("{} is outside of 0 to 6", refcount_order));
    }
    h.refcount_order = refcount_order;
    h.header_length = load_be<std::uint32_t>(in, 100);
    if (h.header_length < fixed_header_v3 || !is_aligned(h.header_length, 8) || h.header_length > h.cluster_size()) {
        return fail(Errc::corrupt, field("header_length", 100),
                    fmt::format("{} is not a multiple of 8 from 104 to the cluster size", h.header_length));
    }
    if (h.header_length > in.size()) {
        return fail(Errc::corrupt, field("header_length", 100),
                    fmt::format("{} reaches past the end of the file ({} bytes)", h.header_length, in.size()));
    }
    if (h.header_length > 104) {
        const auto type = static_cast<std::uint8_t>(in[104]);
        if (type > static_cast<std::uint8_t>(Compression::zstd)) {
            return fail(Errc::unsupported, field("compression_type", 104),
                        fmt::format("{} is neither zlib (0) nor zstd (1)", type));
        }
        h.compression = static_cast<Compression>(type);
    }
    if ((h.compression != Compression::zlib) != h.has(incompatible::compression_type)) {
        return fail(Errc::corrupt, field("compression_type", 104), "contradicts the incompatible feature bit for it");
    }
    return {};
}

Result<void> parse_extension(std::uint32_t type, std::span<const std::byte> data, std::size_t at, Header& h) {
    const auto place = [&](std::string_view name) { return fmt::format("header extension {} (byte {})", name, at); };
    switch (static_cast<ExtensionType>(type)) {
        case ExtensionType::backing_format:
            if (data.size() > max_name_length) {
                return fail(Errc::corrupt, place("backing file format"),
                            fmt::format("a name of {} bytes", data.size()));
            }
            if (!data.empty()) h.backing_format = as_text(data);
            break;
        case ExtensionType::data_file_name:
            if (data.size() > max_data_file_name) {
                return fail(Errc::limit_exceeded, place("data file name"),
                            fmt::format("{} bytes are more than {}, the longest name of a file", data.size(),
                                        max_data_file_name));
            }
            h.data_file_name = as_text(data);
            break;
        case ExtensionType::feature_names: {
            constexpr std::size_t entry = 48;
            for (std::size_t i = 0; i + entry <= data.size() && h.feature_names.size() < max_feature_names;
                 i += entry) {
                const auto name = as_text(data.subspan(i + 2, entry - 2));
                h.feature_names.push_back({static_cast<std::uint8_t>(data[i]), static_cast<std::uint8_t>(data[i + 1]),
                                           std::string(name.substr(0, name.find('\0')))});
            }
            break;
        }
        case ExtensionType::bitmaps: {
            if (data.size() != 24)
                return fail(Errc::corrupt, place("bitmaps"), fmt::format("{} bytes instead of 24", data.size()));
            h.bitmaps = BitmapsExtension{load_be<std::uint32_t>(data, 0),
                                         load_be<std::uint32_t>(data, 4),
                                         load_be<std::uint64_t>(data, 8),
                                         {load_be<std::uint64_t>(data, 16)}};
            break;
        }
        case ExtensionType::encryption: {
            if (data.size() != 16)
                return fail(Errc::corrupt, place("encryption"), fmt::format("{} bytes instead of 16", data.size()));
            h.encryption = EncryptionExtension{{load_be<std::uint64_t>(data, 0)}, load_be<std::uint64_t>(data, 8)};
            break;
        }
        default: h.unknown_extensions.push_back({type, static_cast<std::uint32_t>(data.size())});
    }
    return {};
}

/// Extensions run from the end of the header to a type of 0, or to `limit`: the backing file name, or the end of the
/// cluster. What the file does not have of it is zeros.
Result<void> parse_extensions(std::span<const std::byte> in, std::size_t limit, Header& h) {
    std::size_t at = h.header_length;
    for (std::size_t count = 0; at < limit && at + 8 <= in.size(); ++count) {
        const auto type = load_be<std::uint32_t>(in, at);
        const auto length = load_be<std::uint32_t>(in, at + 4);
        const std::size_t end = std::min(limit, in.size());
        if (at + 8 > end || length > end - at - 8) {
            return fail(
                Errc::corrupt, fmt::format("header extension {:#010x} (byte {})", type, at),
                fmt::format("its {} bytes reach past the space for extensions, which ends at byte {}", length, end));
        }
        if (static_cast<ExtensionType>(type) == ExtensionType::end) return {};
        if (count == max_extensions) {
            return fail(Errc::limit_exceeded, fmt::format("header extension {:#010x} (byte {})", type, at),
                        fmt::format("there are more than {} extensions; no program makes so many, so have the image's "
                                    "maker write it again",
                                    max_extensions));
        }
        TRY_VOID(parse_extension(type, in.subspan(at + 8, length), at, h));
        at += 8 + static_cast<std::size_t>(align_down(length + std::uint64_t{7}, 8));
    }
    return {};
}

Result<void> verify_features(const Header& h) {
    if ((h.incompatible & ~incompatible::known) != 0) {
        std::string names;
        for (const auto& feature : features_of(h, h)) {
            if (feature.kind != Feature::Kind::incompatible || feature.known) continue;
            names += (names.empty() ? "" : ", ") + feature.name;
        }
        return fail(Errc::unsupported, field("incompatible_features", 72),
                    fmt::format("the image needs features that this version does not know: {}", names));
    }
    if (h.has(incompatible::extended_l2) && h.cluster_bits < 14) {
        return fail(Errc::corrupt, field("cluster_bits", 20),
                    fmt::format("{}, but extended L2 entries need clusters of at least 16 KiB (14)", h.cluster_bits));
    }
    if (h.has(incompatible::external_data) && h.snapshot_count != 0) {
        return fail(Errc::corrupt, field("nb_snapshots", 60), "internal snapshots together with an external data file");
    }
    if ((h.autoclear & autoclear::raw_external_data) != 0 && h.has(incompatible::external_data) &&
        !h.backing_name.empty()) {
        return fail(Errc::corrupt, field("backing_file_offset", 8),
                    "a backing file together with a raw external data file");
    }
    if (h.crypt == Crypt::luks && !h.encryption) {
        return fail(Errc::corrupt, field("crypt_method", 32), "LUKS, but the header extension for it is missing");
    }
    if (h.encryption && h.crypt != Crypt::luks) {
        return fail(Errc::corrupt, field("crypt_method", 32), "not LUKS, but there is a header extension for it");
    }
    if (h.encryption && !is_aligned(h.encryption->offset.value, h.cluster_size())) {
        return fail(Errc::corrupt, "header extension encryption",
                    fmt::format("its offset {:#x} is not a multiple of the cluster size", h.encryption->offset.value));
    }
    return {};
}

Result<void> verify_l1(const Header& h) {
    const std::uint64_t bytes = std::uint64_t{h.l1_entries} * 8;
    if (bytes > max_l1_bytes) {
        return fail(Errc::limit_exceeded, field("l1_size", 36),
                    fmt::format("{} entries are more than 32 MiB", h.l1_entries));
    }
    const std::uint64_t needed = divide_up(h.size, Geometry(h).l2_coverage());
    if (h.l1_entries < needed) {
        return fail(Errc::corrupt, field("l1_size", 36),
                    fmt::format("{} entries, but a virtual size of {} bytes needs {}", h.l1_entries, h.size, needed));
    }
    return verify_place("l1_table", 40, h.l1_table, bytes, h.cluster_bits);
}

}  // namespace

Result<std::size_t> header_bytes(std::span<const std::byte> start) {
    if (start.size() < fixed_header_v2) {
        return fail(Errc::corrupt, "header",
                    fmt::format("the file has {} bytes, a qcow2 header at least {}", start.size(), fixed_header_v2));
    }
    if (load_be<std::uint32_t>(start, 0) != magic)
        return fail(Errc::corrupt, field("magic", 0), R"(not a qcow2 image: it does not begin with "QFI\xfb")");
    const auto version = load_be<std::uint32_t>(start, 4);
    if (version != 2 && version != 3)
        return fail(Errc::unsupported, field("version", 4), fmt::format("{} is neither 2 nor 3", version));
    const auto cluster_bits = load_be<std::uint32_t>(start, 20);
    if (cluster_bits < min_cluster_bits || cluster_bits > max_cluster_bits) {
        return fail(Errc::corrupt, field("cluster_bits", 20),
                    fmt::format("{} is outside of {} to {}", cluster_bits, min_cluster_bits, max_cluster_bits));
    }
    return std::size_t{1} << cluster_bits;
}

Result<Header> parse_header(std::span<const std::byte> cluster) {
    const auto wanted = TRY(header_bytes(cluster));
    const auto in = cluster.first(std::min(cluster.size(), wanted));

    Header h;
    h.version = load_be<std::uint32_t>(in, 4);
    const auto name_offset = load_be<std::uint64_t>(in, 8);
    const auto name_length = load_be<std::uint32_t>(in, 16);
    h.cluster_bits = load_be<std::uint32_t>(in, 20);
    h.size = load_be<std::uint64_t>(in, 24);
    const auto crypt = load_be<std::uint32_t>(in, 32);
    h.l1_entries = load_be<std::uint32_t>(in, 36);
    h.l1_table = {load_be<std::uint64_t>(in, 40)};
    h.refcount_table = {load_be<std::uint64_t>(in, 48)};
    h.refcount_table_clusters = load_be<std::uint32_t>(in, 56);
    h.snapshot_count = load_be<std::uint32_t>(in, 60);
    h.snapshot_table = {load_be<std::uint64_t>(in, 64)};

    if (crypt > static_cast<std::uint32_t>(Crypt::luks)) {
        return fail(Errc::unsupported, field("crypt_method", 32),
                    fmt::format("{} is neither none (0), AES (1) nor LUKS (2)", crypt));
    }
    h.crypt = static_cast<Crypt>(crypt);
    if (h.version == 3) TRY_VOID(parse_version3(in, h));

    std::size_t limit = h.cluster_size();
    if (name_offset != 0) {
        if (name_length > max_name_length || name_offset < h.header_length ||
            !lies_within(name_offset, name_length, in.size())) {
            return fail(
                Errc::corrupt, field("backing_file_offset", 8),
                fmt::format("a name of {} bytes at {:#x}: it must lie between the header and the end of the first "
                            "cluster and have at most {} bytes",
                            name_length, name_offset, max_name_length));
        }
        h.backing_name = as_text(in.subspan(static_cast<std::size_t>(name_offset), name_length));
        limit = static_cast<std::size_t>(name_offset);
    }
    TRY_VOID(parse_extensions(in, limit, h));
    TRY_VOID(verify_features(h));
    TRY_VOID(verify_l1(h));
    return h;
}

Result<void> verify_not_marked_corrupt(const HeaderState& header) {
    if (!header.has(incompatible::corrupt)) return {};
    return fail(Errc::corrupt, "header field incompatible_features (byte 72)",
                "the image is marked as corrupt, so it is not written; qcow check says what is wrong, and what to do");
}

Result<void> verify_refcount_table(const HeaderState& h, unsigned cluster_bits, std::uint64_t file_size) {
    const std::uint64_t bytes = std::uint64_t{h.refcount_table_clusters} << cluster_bits;
    if (bytes == 0) return fail(Errc::corrupt, field("refcount_table_clusters", 56), "0: there are no refcounts");
    if (bytes > max_refcount_table_bytes) {
        return fail(Errc::limit_exceeded, field("refcount_table_clusters", 56),
                    fmt::format("{} clusters are more than 8 MiB", h.refcount_table_clusters));
    }
    return verify_table("refcount_table", 48, h.refcount_table, bytes, cluster_bits, file_size);
}

Result<void> verify_snapshot_table(const HeaderState& h, unsigned cluster_bits, std::uint64_t file_size) {
    if (h.snapshot_count > max_snapshots) {
        return fail(Errc::limit_exceeded, field("nb_snapshots", 60),
                    fmt::format("{} is more than {}", h.snapshot_count, max_snapshots));
    }
    // An entry takes at least 40 bytes.
    return verify_table("snapshots", 64, h.snapshot_table, std::uint64_t{h.snapshot_count} * 40, cluster_bits,
                        file_size);
}

std::vector<Feature> features_of(const FixedHeader& h, const HeaderState& state) {
    std::vector<Feature> result;
    const auto collect = [&](Feature::Kind kind, std::uint64_t bits) {
        for (unsigned n = 0; n < 64; ++n) {
            if ((bits & bit(n)) == 0) continue;
            const auto known = std::ranges::find_if(
                known_features, [&](const KnownFeature& f) { return f.kind == kind && f.bit == n; });
            const auto named = std::ranges::find_if(h.feature_names, [&](const FeatureName& f) {
                return f.kind == static_cast<std::uint8_t>(kind) && f.bit == n;
            });
            std::string name = fmt::format("bit {}", n);
            if (known != known_features.end()) {
                name = known->name;
            } else if (named != h.feature_names.end()) {
                name = fmt::format("{} (bit {})", named->name, n);
            }
            result.push_back({kind, n, std::move(name), known != known_features.end()});
        }
    };
    collect(Feature::Kind::incompatible, state.incompatible);
    collect(Feature::Kind::compatible, state.compatible);
    collect(Feature::Kind::autoclear, state.autoclear);
    return result;
}

}  // namespace qcow::format
