#include "qcow2/dirty_bitmaps.h"

#include <algorithm>
#include <array>

#include "base/try.h"
#include "qcow2/metadata/directories.h"

namespace qcow::qcow2 {

using format::BitmapEntry;

Result<void> DirtyBitmaps::load() {
    enabled_.clear();
    marked_ = all_marked_ = false;
    ever_marked_ = false;
    const auto bitmaps = TRY(read_bitmaps(metadata_));
    if (bitmaps.empty()) return {};
    const std::uint64_t size = metadata_.state().size;
    memory_ = std::max<std::uint64_t>(metadata_.cache_bytes() / 4, min_memory);
    HostOffset at = metadata_.state().bitmaps->directory;
    for (std::size_t i = 0; i < bitmaps.size(); ++i) {
        const auto& entry = bitmaps[i];
        const HostOffset flags_at = at + BitmapEntry::flags_at;
        at += entry.encoded_bytes;
        if (!entry.info.enabled || entry.info.in_use) continue;
        auto& bitmap = enabled_.emplace_back(entry, i, flags_at);
        const std::uint64_t bits = divide_up(size, entry.info.granularity);
        if (divide_up(bits, 64) <= memory_ / 8 && verify_bitmap(metadata_, entry)) {
            bitmap.recorded.resize(bits);
            bitmap.kept = true;
            bitmap.has_place.resize(entry.table_entries);
            memory_ -= bitmap.recorded.words() * 8;
        }
    }
    return {};
}

Result<void> DirtyBitmaps::write_flags(HostOffset flags_at, std::uint32_t flags) {
    std::array<std::byte, 4> bytes;
    store_be(bytes, 0, flags);
    return metadata_.file().write(flags_at, bytes);
}

Result<void> DirtyBitmaps::mark_in_use() {
    const std::lock_guard lock(mark_mutex_);
    if (all_marked_) return {};
    ever_marked_ = marked_ = true;
    for (const auto& bitmap : enabled_)
        TRY_VOID(write_flags(bitmap.flags_at, bitmap.entry.flags | BitmapEntry::in_use_flag));
    TRY_VOID(writable_.sync());
    all_marked_.store(true, std::memory_order_release);
    return {};
}

Result<void> DirtyBitmaps::record(GuestOffset at, std::uint64_t length) {
    if (length == 0 || enabled_.empty()) return {};
    if (!all_marked_.load(std::memory_order_acquire)) TRY_VOID(mark_in_use());
    const std::uint64_t cluster_words = metadata_.header().cluster_size() / 8;
    for (auto& bitmap : enabled_) {
        if (!bitmap.kept.load(std::memory_order_acquire)) continue;
        const std::uint64_t first = at.value >> bitmap.entry.granularity_bits;
        const std::uint64_t last = (at.value + length - 1) >> bitmap.entry.granularity_bits;
        for (std::uint64_t word = first / 64; word <= last / 64; ++word) {
            std::uint64_t mask = ~std::uint64_t{0};
            if (word == first / 64) mask <<= first % 64;
            if (word == last / 64) mask &= ~std::uint64_t{0} >> (63 - last % 64);
            // Mostly they are set, and a line that is only read can be in every core's cache.
            if ((bitmap.recorded[word].load(std::memory_order_relaxed) & mask) == mask) continue;
            if (!bitmap.has_place.test(word / cluster_words)) TRY_VOID(make_place(bitmap, word / cluster_words));
            bitmap.recorded[word].fetch_or(mask, std::memory_order_relaxed);
        }
    }
    return {};
}

/// Sees to it that the bits for which there is one entry in the bitmap's table can be written without more space.
Result<void> DirtyBitmaps::make_place(Bitmap& bitmap, std::uint64_t index) {
    const std::lock_guard lock(place_mutex_);
    if (bitmap.has_place.test(index)) return {};
    const auto entry = bitmap_table_entry(metadata_, bitmap.entry, index);
    if (!entry && entry.error().code != Errc::corrupt) return std::unexpected(entry.error());
    if (!entry || entry->all_ones()) {
        // There is nothing to write. What is damaged stays marked: save() tells.
    } else if (entry->cluster().value != 0) {
        TRY_VOID(metadata_.file().allocate(entry->cluster(), metadata_.header().cluster_size()));
    } else {
        TRY_VOID(add_cluster(bitmap.entry.table + index * 8, {}));
    }
    bitmap.has_place.set(index);
    return {};
}

Result<void> DirtyBitmaps::save() {
    if (!marked_) return {};
    TRY_VOID(writable_.verify_writable());
    const std::uint64_t cluster_words = metadata_.header().cluster_size() / 8;
    for (const auto& bitmap : enabled_) {
        if (!bitmap.kept) continue;
        for (std::uint64_t first = 0; first < bitmap.recorded.words(); first += cluster_words) {
            std::vector<std::uint64_t> words(std::min(cluster_words, bitmap.recorded.words() - first));
            for (std::size_t i = 0; i < words.size(); ++i) words[i] = bitmap.recorded[first + i];
            TRY_VOID(save_cluster(bitmap, first / cluster_words, words));
        }
    }
    return {};
}

/// The bits for which there is one entry in the bitmap's table.
Result<void> DirtyBitmaps::save_cluster(const Bitmap& bitmap, std::uint64_t index,
                                        std::span<const std::uint64_t> recorded) {
    if (std::ranges::all_of(recorded, [](const auto& word) { return word == 0; })) return {};
    const auto entry = TRY(bitmap_table_entry(metadata_, bitmap.entry, index));
    if (entry.all_ones()) return {};
    std::vector<std::byte> bits(metadata_.header().cluster_size());
    TRY(metadata_.file().read(entry.cluster(), bits));
    bool changes = false;
    for (std::size_t i = 0; i < recorded.size(); ++i) {
        const auto before = load_bits(bits, i);
        const auto after = before | recorded[i];
        changes |= before != after;
        store_bits(bits, i, after);
    }
    // Written over in place: nobody trusts them now.
    return changes ? metadata_.file().write(entry.cluster(), bits) : Result<void>();
}

/// Gives an entry of a bitmap's table a cluster, of these bits, or zeros. Nobody trusts the bitmap now, so the order
/// does not matter.
Result<void> DirtyBitmaps::add_cluster(HostOffset table_entry, std::span<const std::byte> bits) {
    Change change(writable_);
    const HostOffset cluster = TRY(change.take_table(MetadataMap::Kind::bitmaps));
    TRY_VOID(bits.empty() ? metadata_.file().allocate(cluster, metadata_.cluster_size())
                          : metadata_.file().write(cluster, bits));
    return change.commit(table_entry, {&cluster.value, 1}, Barrier::none);
}

Result<void> DirtyBitmaps::clear_in_use() {
    if (!marked_) return {};
    for (const auto& bitmap : enabled_) {
        if (bitmap.kept) TRY_VOID(write_flags(bitmap.flags_at, bitmap.entry.flags));
    }
    TRY_VOID(writable_.sync());
    for (auto& bitmap : enabled_) {
        for (std::uint64_t word = 0; word < bitmap.recorded.words(); ++word) bitmap.recorded[word] = 0;
    }
    marked_ = all_marked_ = false;
    return {};
}

const RecordedBits* DirtyBitmaps::recorded(std::size_t index) const {
    const auto* found = find(index);
    return found != nullptr && found->kept ? &found->recorded : nullptr;
}

bool DirtyBitmaps::forgotten(std::size_t index) const {
    if (!ever_marked_) return false;
    const auto* found = find(index);
    return found != nullptr && !found->kept;
}

const DirtyBitmaps::Bitmap* DirtyBitmaps::find(std::size_t index) const {
    const auto found = std::ranges::lower_bound(enabled_, index, {}, &Bitmap::index);
    return found != enabled_.end() && found->index == index ? &*found : nullptr;
}

}  // namespace qcow::qcow2
