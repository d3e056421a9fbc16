#include "qcow2/metadata/metadata_map.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <iterator>

#include "base/try.h"
#include "format/refcount.h"
#include "qcow/text.h"
#include "qcow2/metadata/directories.h"

namespace qcow::qcow2 {
namespace {

constexpr std::array<std::string_view, 8> names = {"the header",         "an L1 table",          "an L2 table",
                                                   "the refcount table", "a refcount block",     "the snapshot table",
                                                   "a bitmap",           "the encryption header"};

/// What a chunk of clusters is in the filter: never the number of a cluster.
std::uint64_t key_of_chunk(std::uint64_t chunk) { return ~chunk; }

/// Calls `visit` with each word of a table that is not zero. Nobody has changed the table since the file was opened.
template <class Visit>
Result<void> each_word(const Metadata& metadata, HostOffset table, std::uint64_t count, Visit&& visit) {
    std::array<std::uint64_t, 512> words;
    std::uint64_t data_end = 0;
    for (std::uint64_t i = 0; i < count;) {
        // Hostile tables are long and nearly all hole.
        if (i >= data_end && count > words.size()) {
            const auto run = TRY(metadata.file().run(table + i * 8, (count - i) * 8));
            data_end = i + std::max<std::uint64_t>(1, run.length / 8);
            if (!run.data && run.length >= 8) {
                i = data_end;
                continue;
            }
        }
        const auto n = TRY(metadata.words().load(
            table + i * 8, std::span(words).first(std::min<std::uint64_t>(words.size(), count - i))));
        for (std::size_t k = 0; k < n; ++k) {
            if (words[k] != 0) TRY_VOID(visit(words[k]));
        }
        i += n;
    }
    return {};
}

}  // namespace

Result<void> MetadataMap::load(const Metadata& metadata) {
    const auto& header = metadata.header();
    const auto state = metadata.state();
    const std::uint64_t cluster_size = header.cluster_size();
    const std::uint64_t file_size = TRY(metadata.file().size());
    const auto too_large = [&](const std::string& thing, const std::string& what) {
        return fail(Errc::limit_exceeded, fmt::format("{}: {}", metadata.file().name(), thing),
                    what + ", or open the image for reading only");
    };
    const auto add_table = [&](HostOffset at, std::uint64_t length, Kind kind) -> Result<void> {
        if (length == 0) return {};
        if (!is_aligned(at.value, cluster_size) ||
            !lies_within(at.value, length, divide_up(file_size, cluster_size) * cluster_size)) {
            return fail(Errc::corrupt, metadata.file().name(),
                        fmt::format("{} at host offset {:#x} is not aligned or does not lie within the file; check the "
                                    "image before it is written",
                                    names[static_cast<std::size_t>(kind)], at.value));
        }
        if (runs_.size() >= max_runs) {
            return too_large(
                "metadata",
                fmt::format("they lie in more than {} places; remove bitmaps with another program", max_runs));
        }
        return add(at, length, kind);
    };
    TRY_VOID(add({0}, cluster_size, Kind::header));
    TRY_VOID(add_table(state.refcount_table, state.refcount_table_clusters * cluster_size, Kind::refcount_table));
    TRY_VOID(each_word(
        metadata, state.refcount_table, state.refcount_table_clusters * cluster_size / 8,
        [&](std::uint64_t word) {
            return add_table(format::RefcountTableEntry{word}.block(), cluster_size, Kind::refcount_block);
        }));
    TRY_VOID(add_table(state.l1_table, std::uint64_t{state.l1_entries} * 8, Kind::l1_table));
    TRY_VOID(each_word(
        metadata, state.l1_table, state.l1_entries,
        [&](std::uint64_t word) -> Result<void> {
            const format::L1Entry entry{word};
            return entry.allocated() ? add_table(entry.l2_table(), cluster_size, Kind::l2_table) : Result<void>();
        }));
    if (header.encryption) TRY_VOID(add(header.encryption->offset, header.encryption->length, Kind::encryption));
    const auto snapshots = TRY(read_snapshots(metadata));
    TRY_VOID(add_table(state.snapshot_table, snapshots.bytes, Kind::snapshots));
    for (const auto& snapshot : snapshots.entries) {
        const std::uint64_t bytes = std::uint64_t{snapshot.l1_entries} * 8;
        if (bytes > format::max_l1_bytes) {
            return too_large(
                fmt::format("the L1 table of snapshot \"{}\" (host offset {:#x})", printable(snapshot.info.name),
                            snapshot.l1_table.value),
                fmt::format("its {} entries are more than 32 MiB; delete the snapshot with another program",
                            snapshot.l1_entries));
        }
        TRY_VOID(add_table(snapshot.l1_table, bytes, Kind::l1_table));
    }
    const auto bitmaps = TRY(read_bitmaps(metadata));
    if (!bitmaps.empty()) TRY_VOID(add_table(header.bitmaps->directory, header.bitmaps->directory_size, Kind::bitmaps));
    for (const auto& bitmap : bitmaps) {
        if (bitmap.table_entries > format::max_bitmap_bytes / cluster_size) {
            return too_large(fmt::format("bitmap \"{}\" (table at host offset {:#x})", printable(bitmap.info.name),
                                         bitmap.table.value),
                             fmt::format("its {} table entries stand for more than 512 MiB of bits; remove it with "
                                         "another program",
                                         bitmap.table_entries));
        }
        TRY_VOID(add_table(bitmap.table, std::uint64_t{bitmap.table_entries} * 8, Kind::bitmaps));
        TRY_VOID(each_word(
            metadata, bitmap.table, bitmap.table_entries,
            [&](std::uint64_t word) -> Result<void> {
                const auto cluster = format::BitmapTableEntry{word}.cluster();
                return cluster.value == 0 ? Result<void>() : add_table(cluster, cluster_size, Kind::bitmaps);
            }));
    }
    return {};
}

void MetadataMap::put_in_filter(std::uint64_t key) {
    const std::uint64_t bit_index = hash(key);
    filter_[bit_index / 64].fetch_or(bit(bit_index % 64), std::memory_order_relaxed);
}

bool MetadataMap::in_filter(std::uint64_t key) const {
    const std::uint64_t bit_index = hash(key);
    return (filter_[bit_index / 64].load(std::memory_order_relaxed) & bit(bit_index % 64)) != 0;
}

/// The first run that has clusters in [first, end).
MetadataMap::Runs::const_iterator MetadataMap::first_in(std::uint64_t first, std::uint64_t end) const {
    auto found = runs_.upper_bound(first);
    if (found != runs_.begin() && std::prev(found)->second.end > first) --found;
    return found != runs_.end() && found->first < end ? found : runs_.end();
}

Result<void> MetadataMap::add(HostOffset at, std::uint64_t length, Kind kind) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t first = at.value >> cluster_bits_;
    const std::uint64_t end = end_of(at, length);
    if (first == end) return {};
    if (const auto there = first_in(first, end); there != runs_.end()) {
        return fail(
            Errc::corrupt, fmt::format("host offset {:#x}", std::max(first, there->first) << cluster_bits_),
            fmt::format("{} and {} overlap here; check the image before it is written",
                        names[static_cast<std::size_t>(there->second.kind)], names[static_cast<std::size_t>(kind)]));
    }
    // By its own length, whatever it becomes one with.
    if (end - first <= bit(chunk_bits)) {
        for (auto cluster = first; cluster < end; ++cluster) put_in_filter(cluster);
    } else {
        for (auto chunk = first >> chunk_bits; chunk <= (end - 1) >> chunk_bits; ++chunk)
            put_in_filter(key_of_chunk(chunk));
    }
    const auto next = runs_.lower_bound(end);
    if (next != runs_.begin()) {
        const auto before = std::prev(next);
        if (before->second.end == first && before->second.kind == kind) {
            before->second.end = end;
            return {};
        }
    }
    runs_.emplace_hint(next, first, Run{end, kind});
    return {};
}

void MetadataMap::remove(HostOffset at, std::uint64_t length) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t first = at.value >> cluster_bits_;
    const std::uint64_t end = end_of(at, length);
    for (auto found = first_in(first, end); found != runs_.end(); found = first_in(first, end)) {
        const auto [begin, run] = *found;
        // First of all what may fail for want of memory.
        if (run.end > end) runs_.emplace(end, Run{run.end, run.kind});
        if (begin < first) {
            runs_.at(begin).end = first;
        } else {
            runs_.erase(found);
        }
    }
}

std::uint64_t MetadataMap::end() const {
    const std::lock_guard lock(mutex_);
    return runs_.empty() ? 0 : runs_.rbegin()->second.end;
}

std::string_view MetadataMap::find(HostOffset at, std::uint64_t length) const {
    const std::uint64_t end = end_of(at, length);
    for (std::uint64_t cluster = at.value >> cluster_bits_; cluster < end; ++cluster) {
        if (!in_filter(cluster) && !in_filter(key_of_chunk(cluster >> chunk_bits))) continue;
        const std::lock_guard lock(mutex_);
        const auto found = first_in(cluster, end);
        return found == runs_.end() ? std::string_view() : names[static_cast<std::size_t>(found->second.kind)];
    }
    return {};
}

}  // namespace qcow::qcow2
