// Bitmaps of a disk that gets another size.
//
// All of them are marked in_use meanwhile, so that nobody believes what a crash leaves. References have to be right at
// every instant all the same: a table is durable before the directory names it, and is never shorter than that says.

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/try.h"
#include "qcow/text.h"
#include "qcow2/dirty_bitmaps.h"
#include "qcow2/metadata/directories.h"

namespace qcow::qcow2 {

using format::BitmapEntry;

std::uint64_t DirtyBitmaps::entries_for(const BitmapEntry& entry, std::uint64_t size) const {
    return divide_up(divide_up(size, entry.info.granularity), metadata_.header().cluster_size() * 8);
}

std::uint64_t DirtyBitmaps::table_bytes(std::uint64_t entries) const {
    const auto cluster_size = metadata_.header().cluster_size();
    return divide_up(entries * 8, cluster_size) * cluster_size;
}

/// The bitmaps that can be believed, and will be marked: those that will be of the new size, and some that stay marked.
Result<void> DirtyBitmaps::find_true_bitmaps(std::uint64_t size) {
    const auto bitmaps = TRY(read_bitmaps(metadata_));
    HostOffset at = bitmaps.empty() ? HostOffset{} : metadata_.state().bitmaps->directory;
    if (size == 0 && !bitmaps.empty()) {
        return fail(Errc::invalid_argument, metadata_.file().name(),
                    fmt::format("a disk of 0 bytes has no bitmaps, and it has {}; remove them first", bitmaps.size()));
    }
    for (std::size_t i = 0; i < bitmaps.size(); ++i) {
        Resize bitmap{bitmaps[i], at};
        at += bitmap.entry.encoded_bytes;
        const auto enabled = std::ranges::find(enabled_, i, &Bitmap::index);
        if (enabled != enabled_.end()) bitmap.enabled = &*enabled;
        if (bitmap.enabled != nullptr ? !bitmap.enabled->kept : bitmap.entry.info.in_use) continue;
        if (entries_for(bitmap.entry, size) > format::max_bitmap_bytes / metadata_.header().cluster_size()) {
            return fail(Errc::limit_exceeded, metadata_.file().name(),
                        fmt::format("bitmap \"{}\" would have more than 512 MiB of bits; remove it first",
                                    printable(bitmap.entry.info.name)));
        }
        resizing_.push_back(std::move(bitmap));
    }
    return {};
}

Result<void> DirtyBitmaps::begin_resize(std::uint64_t size) {
    resizing_.clear();
    no_places_ = std::unique_lock(place_mutex_);
    auto begun = [&]() -> Result<void> {
        TRY_VOID(find_true_bitmaps(size));
        if (!enabled_.empty()) TRY_VOID(mark_in_use());
        for (const auto& bitmap : resizing_) {
            if (bitmap.enabled == nullptr)
                TRY_VOID(write_flags(bitmap.flags_at(), bitmap.entry.flags | BitmapEntry::in_use_flag));
        }
        if (!resizing_.empty()) TRY_VOID(writable_.sync());
        for (auto& bitmap : resizing_) TRY_VOID(prepare(bitmap, size));
        return {};
    }();
    if (begun) return begun;
    static_cast<void>(cancel_resize());
    return begun;
}

/// Takes what one needs. What is damaged, or no longer fits into memory, is given up: it stays marked.
Result<void> DirtyBitmaps::prepare(Resize& bitmap, std::uint64_t size) {
    const std::uint64_t words = divide_up(divide_up(size, bitmap.entry.info.granularity), 64);
    const std::uint64_t there = bitmap.enabled == nullptr ? words : bitmap.enabled->recorded.capacity();
    if (words <= there + memory_ / 8) {
        if (words > there) {
            bitmap.enabled->recorded.reserve(words);
            memory_ -= (words - there) * 8;
        }
        auto prepared = verify_bitmap(metadata_, bitmap.entry);
        if (prepared && size > metadata_.state().size) {
            prepared = clear_behind_end(bitmap.entry);
            if (prepared) prepared = extend_table(bitmap, entries_for(bitmap.entry, size));
        }
        if (prepared) return prepared;
        if (prepared.error().code != Errc::corrupt && prepared.error().code != Errc::unsupported) return prepared;
    }
    bitmap.given_up = true;
    if (bitmap.enabled != nullptr) bitmap.enabled->kept = false;
    return {};
}

/// Bits that the old size does not need are nobody's, and would be what the new bytes have.
Result<void> DirtyBitmaps::clear_behind_end(const BitmapEntry& entry) {
    const auto cluster_size = metadata_.header().cluster_size();
    const std::uint64_t bits = divide_up(metadata_.state().size, entry.info.granularity);
    const std::uint64_t index = bits / (cluster_size * 8);
    const std::uint64_t used = bits % (cluster_size * 8);
    if (used == 0) return {};
    const auto found = TRY(bitmap_table_entry(metadata_, entry, index));
    const bool has_cluster = found.cluster().value != 0;
    if (!has_cluster && !found.all_ones()) return {};
    std::vector<std::byte> bytes(cluster_size, std::byte{0xff});
    if (has_cluster) TRY(metadata_.file().read(found.cluster(), bytes));
    const auto rest = std::span(bytes).subspan(used / 8);
    const auto kept = rest[0] & static_cast<std::byte>(low_bits(used % 8));
    std::ranges::fill(rest, std::byte{0});
    rest[0] = kept;
    return has_cluster ? metadata_.file().write(found.cluster(), bytes) : add_cluster(entry.table + index * 8, bytes);
}

/// A copy of the table with room for so many entries.
Result<void> DirtyBitmaps::extend_table(Resize& bitmap, std::uint64_t entries) {
    if (entries <= bitmap.entry.table_entries) return {};
    const std::uint64_t bytes = table_bytes(entries);
    auto& change = bitmap.change.emplace(writable_);
    const HostOffset table = TRY(change.take_table(MetadataMap::Kind::bitmaps, bytes / metadata_.cluster_size()));
    TRY_VOID(metadata_.file().write(table,
                                    TRY(copy_words(metadata_, bitmap.entry.table, bitmap.entry.table_entries, bytes))));
    bitmap.new_table = table;
    return {};
}

Result<void> DirtyBitmaps::finish_resize(std::uint64_t size) {
    auto done = change_entries(size);
    if (done) done = unmark_disabled();
    for (auto& bitmap : resizing_) {
        if (!done && bitmap.enabled != nullptr) bitmap.enabled->kept = false;
    }
    resizing_.clear();
    no_places_.unlock();
    return done;
}

Result<void> DirtyBitmaps::change_entries(std::uint64_t size) {
    std::erase_if(resizing_, [](const Resize& bitmap) { return bitmap.given_up; });
    if (resizing_.empty()) return {};
    for (const auto& bitmap : resizing_) {
        if (bitmap.new_table.value == 0) continue;
        std::array<std::byte, 8> bytes;
        store_be(bytes, 0, bitmap.new_table.value);
        TRY_VOID(metadata_.file().write(bitmap.at, bytes));
    }
    TRY_VOID(writable_.sync());
    for (const auto& bitmap : resizing_) {
        std::array<std::byte, 4> bytes;
        store_be(bytes, 0, static_cast<std::uint32_t>(entries_for(bitmap.entry, size)));
        TRY_VOID(metadata_.file().write(bitmap.at + BitmapEntry::table_entries_at, bytes));
    }
    TRY_VOID(writable_.sync());
    for (auto& bitmap : resizing_) {
        const std::uint64_t entries = entries_for(bitmap.entry, size);
        TRY_VOID(drop_old(bitmap, entries));
        if (bitmap.enabled == nullptr) continue;
        auto& enabled = *bitmap.enabled;
        enabled.entry.table_entries = static_cast<std::uint32_t>(entries);
        if (bitmap.new_table.value != 0) enabled.entry.table = bitmap.new_table;
        enabled.recorded.resize(divide_up(size, bitmap.entry.info.granularity));
        enabled.has_place.resize(entries);
    }
    return {};
}

/// Drops what the directory no longer leads to.
Result<void> DirtyBitmaps::drop_old(Resize& bitmap, std::uint64_t entries) {
    const auto& entry = bitmap.entry;
    auto& change = bitmap.change ? *bitmap.change : bitmap.change.emplace(writable_);
    for (std::uint64_t index = entries; index < entry.table_entries; ++index) {
        const auto cluster = TRY(bitmap_table_entry(metadata_, entry, index)).cluster();
        if (cluster.value != 0) change.drop_table(cluster, metadata_.cluster_size());
    }
    const std::uint64_t kept = bitmap.new_table.value != 0 ? 0 : table_bytes(entries);
    const std::uint64_t bytes = table_bytes(entry.table_entries);
    if (kept < bytes) change.drop_table(entry.table + kept, bytes - kept);
    change.commit();
    return {};
}

Result<void> DirtyBitmaps::unmark_disabled() {
    for (const auto& bitmap : resizing_) {
        if (bitmap.enabled == nullptr && !bitmap.given_up) TRY_VOID(write_flags(bitmap.flags_at(), bitmap.entry.flags));
    }
    return resizing_.empty() ? Result<void>() : writable_.sync();
}

Result<void> DirtyBitmaps::cancel_resize() {
    auto done = writable_.verify_writable();  // else nobody knows what the file has, and they stay marked
    if (done) done = unmark_disabled();
    resizing_.clear();
    no_places_.unlock();
    return done;
}

}  // namespace qcow::qcow2
