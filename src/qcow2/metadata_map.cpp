#include "qcow2/metadata_map.h"

#include <fmt/format.h>

#include <array>

#include "base/try.h"
#include "format/refcount.h"
#include "qcow2/tables.h"

namespace qcow::qcow2 {
namespace {

constexpr std::array<std::string_view, 8> names = {"the header",         "an L1 table",          "an L2 table",
                                                   "the refcount table", "a refcount block",     "the snapshot table",
                                                   "a bitmap",           "the encryption header"};

/// Calls `visit` with each word of a table that is not zero.
template <class Visit>
Result<void> each_word(const Core& core, HostOffset table, std::uint64_t count, Visit&& visit) {
    std::array<std::uint64_t, 512> words;
    for (std::uint64_t i = 0; i < count;) {
        const auto n = TRY(
            core.words.load(table + i * 8, std::span(words).first(std::min<std::uint64_t>(words.size(), count - i))));
        for (std::size_t k = 0; k < n; ++k) {
            if (words[k] != 0) TRY_VOID(visit(words[k]));
        }
        i += n;
    }
    return {};
}

}  // namespace

Result<void> MetadataMap::load(const Core& core) {
    const auto& header = core.header;
    const std::uint64_t cluster_size = header.cluster_size();
    const std::uint64_t file_size = TRY(core.file->size());
    const auto add_table = [&](HostOffset at, std::uint64_t length, Kind kind) -> Result<void> {
        if (length == 0) return {};
        if (!is_aligned(at.value, cluster_size) ||
            !lies_within(at.value, length, divide_up(file_size, cluster_size) * cluster_size)) {
            return fail(Errc::corrupt, core.file->name(),
                        fmt::format("{} at host offset {:#x} is not aligned or does not lie within the file; check the "
                                    "image before it is written",
                                    names[static_cast<std::size_t>(kind)], at.value));
        }
        return add(at, length, kind);
    };
    TRY_VOID(add({0}, cluster_size, Kind::header));
    TRY_VOID(add_table(header.refcount_table, header.refcount_table_clusters * cluster_size, Kind::refcount_table));
    TRY_VOID(each_word(
        core, header.refcount_table, header.refcount_table_clusters * cluster_size / 8,
        [&](std::uint64_t word) {
            return add_table(format::RefcountTableEntry{word}.block(), cluster_size, Kind::refcount_block);
        }));
    TRY_VOID(add_table(header.l1_table, std::uint64_t{header.l1_entries} * 8, Kind::l1_table));
    TRY_VOID(each_word(
        core, header.l1_table, header.l1_entries,
        [&](std::uint64_t word) -> Result<void> {
            const format::L1Entry entry{word};
            return entry.allocated() ? add_table(entry.l2_table(), cluster_size, Kind::l2_table) : Result<void>();
        }));
    if (header.encryption) TRY_VOID(add(header.encryption->offset, header.encryption->length, Kind::encryption));
    const auto snapshots = TRY(read_snapshots(core));
    TRY_VOID(add_table(header.snapshot_table, snapshots.bytes, Kind::snapshots));
    for (const auto& snapshot : snapshots.entries) {
        TRY_VOID(add_table(snapshot.l1_table, std::uint64_t{snapshot.l1_entries} * 8, Kind::l1_table));
    }
    const auto bitmaps = TRY(read_bitmaps(core));
    if (!bitmaps.empty()) TRY_VOID(add_table(header.bitmaps->directory, header.bitmaps->directory_size, Kind::bitmaps));
    for (const auto& bitmap : bitmaps) {
        TRY_VOID(add_table(bitmap.table, std::uint64_t{bitmap.table_entries} * 8, Kind::bitmaps));
        TRY_VOID(each_word(
            core, bitmap.table, bitmap.table_entries,
            [&](std::uint64_t word) -> Result<void> {
                const auto cluster = format::BitmapTableEntry{word}.cluster();
                return cluster.value == 0 ? Result<void>() : add_table(cluster, cluster_size, Kind::bitmaps);
            }));
    }
    return {};
}

Result<void> MetadataMap::add(HostOffset at, std::uint64_t length, Kind kind) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t end = (at.value + length + low_bits(cluster_bits_)) >> cluster_bits_;
    for (std::uint64_t cluster = at.value >> cluster_bits_; cluster < end; ++cluster) {
        const auto [there, added] = kinds_.emplace(cluster, kind);
        if (!added) {
            return fail(
                Errc::corrupt, fmt::format("host offset {:#x}", cluster << cluster_bits_),
                fmt::format("{} and {} overlap here; check the image before it is written",
                            names[static_cast<std::size_t>(there->second)], names[static_cast<std::size_t>(kind)]));
        }
        const std::uint64_t bit_index = hash(cluster);
        filter_[bit_index / 64].fetch_or(bit(bit_index % 64), std::memory_order_relaxed);
    }
    return {};
}

void MetadataMap::remove(HostOffset at, std::uint64_t length) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t end = (at.value + length + low_bits(cluster_bits_)) >> cluster_bits_;
    for (std::uint64_t cluster = at.value >> cluster_bits_; cluster < end; ++cluster) kinds_.erase(cluster);
}

std::string_view MetadataMap::find(HostOffset at, std::uint64_t length) const {
    const std::uint64_t end = (at.value + length + low_bits(cluster_bits_)) >> cluster_bits_;
    for (std::uint64_t cluster = at.value >> cluster_bits_; cluster < end; ++cluster) {
        const std::uint64_t bit_index = hash(cluster);
        if ((filter_[bit_index / 64].load(std::memory_order_relaxed) & bit(bit_index % 64)) == 0) continue;
        const std::lock_guard lock(mutex_);
        if (const auto found = kinds_.find(cluster); found != kinds_.end())
            return names[static_cast<std::size_t>(found->second)];
    }
    return {};
}

}  // namespace qcow::qcow2
