#include "qcow2/metadata/directories.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/endian.h"
#include "base/try.h"
#include "qcow/text.h"

namespace qcow::qcow2 {
namespace {

Result<std::vector<std::byte>> read_bytes(const Storage& file, HostOffset at, std::uint64_t bytes) {
    std::vector<std::byte> result(bytes);
    const auto there = TRY(file.read(at, result));
    result.resize(there);
    return result;
}

/// Part of a table: at most `bytes` bytes, as far as tables may lie.
Result<std::vector<std::byte>> read_piece(const Metadata& metadata, HostOffset at, std::uint64_t bytes) {
    const std::uint64_t end = TRY(metadata.addressable_bytes());
    std::vector<std::byte> result(std::min(bytes, end - std::min(end, at.value)));
    TRY(metadata.file().read(at, result));
    return result;
}

}  // namespace

Result<std::vector<std::byte>> read_first_cluster(const Storage& file) {
    const auto start = TRY(read_bytes(file, {0}, format::fixed_header_v2));
    return read_bytes(file, {0}, TRY(format::header_bytes(start)));
}

Result<SnapshotTable> read_snapshots(const Metadata& metadata) {
    SnapshotTable table;
    const auto header = metadata.state();
    if (header.snapshot_count == 0) return table;
    const auto file_size = TRY(metadata.addressable_bytes());
    if (auto there = format::verify_snapshot_table(header, metadata.header().cluster_bits, file_size); !there)
        return std::unexpected(std::move(there).error().in(metadata.file().name()));
    // How long the table is shows only as it is parsed; a piece of it is in memory, which has at least an entry.
    std::vector<std::byte> piece;
    std::uint64_t piece_at = 0;
    for (std::uint32_t i = 0; i < header.snapshot_count; ++i) {
        const auto parse = [&] {
            return format::parse_snapshot(std::span(piece).subspan(table.bytes - piece_at), metadata.header().version,
                                          header.size);
        };
        auto entry = parse();
        if (!entry) {
            piece =
                TRY(read_piece(metadata, header.snapshot_table + table.bytes,
                               std::min(format::max_snapshot_bytes, format::max_snapshot_table_bytes - table.bytes)));
            piece_at = table.bytes;
            entry = parse();
        }
        const auto place = [&] {
            return fmt::format("snapshot table entry {} (host offset {:#x})", i,
                               (header.snapshot_table + table.bytes).value);
        };
        if (!entry) return std::unexpected(std::move(entry).error().in(place()).in(metadata.file().name()));
        table.bytes += entry->encoded_bytes;
        table.entries.push_back(*std::move(entry));
    }
    return table;
}

Result<std::vector<format::BitmapEntry>> read_bitmaps(const Metadata& metadata) {
    std::vector<format::BitmapEntry> result;
    const auto& header = metadata.header();
    const auto state = metadata.state();
    if (!state.bitmaps_consistent()) return result;
    const auto& extension = *state.bitmaps;
    const auto bad_extension = [&](std::string what) {
        return fail(
            Errc::corrupt,
            fmt::format("{}: bitmap directory at host offset {:#x}", metadata.file().name(), extension.directory.value),
            std::move(what));
    };
    const auto file_size = TRY(metadata.addressable_bytes());
    if (extension.count == 0 || extension.count > format::max_bitmaps)
        return bad_extension(fmt::format("{} bitmaps: there may be 1 to {}", extension.count, format::max_bitmaps));
    if (!is_aligned(extension.directory.value, header.cluster_size()))
        return bad_extension("its offset is not a multiple of the cluster size");
    if (!lies_within(extension.directory.value, extension.directory_size, file_size)) {
        return bad_extension(
            fmt::format("its {} bytes reach past the end of the file ({} bytes)", extension.directory_size, file_size));
    }
    if (extension.reserved != 0) return bad_extension(fmt::format("the reserved field is {:#x}", extension.reserved));
    if (extension.directory_size > format::max_bitmap_directory_bytes) {
        return bad_extension(
            fmt::format("{} bytes are more than {}", extension.directory_size, format::max_bitmap_directory_bytes));
    }

    const auto bytes = TRY(read_piece(metadata, extension.directory, extension.directory_size));
    auto rest = std::span<const std::byte>(bytes);
    for (std::uint32_t i = 0; i < extension.count; ++i) {
        auto entry = format::parse_bitmap(rest);
        if (!entry) return bad_extension(fmt::format("entry {}: {}", i, entry.error().message()));
        rest = rest.subspan(entry->encoded_bytes);
        result.push_back(*std::move(entry));
    }
    if (!rest.empty()) {
        return bad_extension(
            fmt::format("{} bytes are left behind the last of {} entries", rest.size(), extension.count));
    }
    return result;
}

Result<std::vector<std::uint64_t>> load_words(const Metadata& metadata, HostOffset table, std::uint64_t entries) {
    std::vector<std::uint64_t> words(entries);
    for (std::size_t i = 0; i < words.size();) i += TRY(metadata.words().load(table + i * 8, std::span(words).subspan(i)));
    return words;
}

std::vector<std::size_t> find_snapshots(std::span<const format::SnapshotEntry> snapshots, std::string_view id_or_name) {
    const auto find = [&](std::string SnapshotInfo::* field, std::string_view text) {
        std::vector<std::size_t> found;
        for (std::size_t i = 0; i < snapshots.size(); ++i) {
            if (snapshots[i].info.*field == text) found.push_back(i);
        }
        return found;
    };
    auto found = find(&SnapshotInfo::id, id_or_name);
    if (found.empty()) found = find(&SnapshotInfo::name, id_or_name);
    constexpr std::string_view id = "snapshot.id=";
    constexpr std::string_view name = "snapshot.name=";
    if (found.empty() && id_or_name.starts_with(id)) found = find(&SnapshotInfo::id, id_or_name.substr(id.size()));
    if (found.empty() && id_or_name.starts_with(name))
        found = find(&SnapshotInfo::name, id_or_name.substr(name.size()));
    return found;
}

std::vector<std::byte> encode_words(std::span<const std::uint64_t> words, std::uint64_t bytes) {
    std::vector<std::byte> encoded(bytes);
    for (std::size_t i = 0; i < words.size(); ++i) store_be(encoded, i * 8, words[i]);
    return encoded;
}

Result<std::vector<std::byte>> copy_words(const Metadata& metadata, HostOffset table, std::uint64_t entries,
                                          std::uint64_t bytes) {
    return encode_words(TRY(load_words(metadata, table, entries)), bytes);
}

Result<void> verify_snapshot_l1(const Metadata& metadata, const format::SnapshotEntry& snapshot) {
    const auto bad = [&](std::string what) {
        return fail(Errc::corrupt,
                    fmt::format("{}: L1 table of snapshot \"{}\" at host offset {:#x}", metadata.file().name(),
                                printable(snapshot.info.name), snapshot.l1_table.value),
                    std::move(what));
    };
    const std::uint64_t bytes = std::uint64_t{snapshot.l1_entries} * 8;
    const auto file_size = TRY(metadata.addressable_bytes());
    if (bytes > format::max_l1_bytes) return bad(fmt::format("{} entries are more than 32 MiB", snapshot.l1_entries));
    if (!is_aligned(snapshot.l1_table.value, metadata.header().cluster_size()))
        return bad("its offset is not a multiple of the cluster size");
    if (!lies_within(snapshot.l1_table.value, bytes, file_size) || (bytes != 0 && snapshot.l1_table.value == 0)) {
        return bad(fmt::format("its {} entries do not lie within the file ({} bytes)", snapshot.l1_entries, file_size));
    }
    const auto needed = divide_up(snapshot.info.virtual_size, metadata.geometry().l2_coverage());
    if (snapshot.l1_entries < needed) {
        return bad(fmt::format("{} entries, but a virtual size of {} bytes needs {}", snapshot.l1_entries,
                               snapshot.info.virtual_size, needed));
    }
    return {};
}

}  // namespace qcow::qcow2
