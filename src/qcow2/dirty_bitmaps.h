#pragma once
// The persistent bitmaps of an image that is being written.

#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <vector>

#include "qcow2/bitmap_runs.h"
#include "qcow2/metadata/change.h"

namespace qcow::qcow2 {

/// Keeps every enabled bitmap true, or marked as not to be trusted.
///
/// Before the first guest byte changes, each one is marked in_use on disk. From then on what changes is recorded in
/// memory; save() adds it to the bits in the file, and once that is durable clear_in_use() says so. Changes that keep
/// what the guest reads mark nothing. Whenever power is lost, a bitmap is marked or covers all changes. The bits get
/// their place in the file when the first of them is recorded, so that save() needs no space.
///
/// Enabled bitmaps that cannot be kept are marked and stay so: what is damaged or not understood, and what does not fit
/// into memory. For all bits there is a quarter of the image's share of the cache budget, on top of it, and at least
/// min_memory (which does for a disk of 2 TiB and bits for 64 KiB); earlier bitmaps of the directory come first.
/// Disabled ones, and those that are in_use already, stay as they are. When the disk gets another size, all that are
/// not in_use do, too.
class DirtyBitmaps {
public:
    static constexpr std::uint64_t min_memory = 4 * MiB;

    explicit DirtyBitmaps(WritableMetadata& writable) : writable_(writable), metadata_(writable.metadata()) {}

    /// Reads the directory, also after a change of it: none is marked then, and no request is in flight. Errc::corrupt,
    /// io.
    Result<void> load();

    /// These guest bytes are going to change. The bitmaps are marked, durably, when it returns. Thread-safe; takes a
    /// lock only to mark them, and where bits get their place in the file. Errc::no_space, io: the bytes must not
    /// change.
    Result<void> record(GuestOffset at, std::uint64_t length);

    /// Adds what was recorded to the bits in the file. Not durable before the next flush. No request may be in flight.
    Result<void> save();

    /// What save() did is durable. So is this.
    Result<void> clear_in_use();

    // The disk gets another size. One thread at a time; requests up to the smaller size may be in flight.

    /// Marks every bitmap that is true, and takes the space that they need for so many bytes. Durable. Errc::no_space,
    /// limit_exceeded: nothing has changed.
    Result<void> begin_resize(std::uint64_t size);
    /// The header has the new size, durably: now the bitmaps are of that size, new bits clean. Durable.
    Result<void> finish_resize(std::uint64_t size);
    /// The header has the old size.
    Result<void> cancel_resize();

    /// What was recorded for this entry of the directory; null: it is not kept. Thread-safe.
    [[nodiscard]] const RecordedBits* recorded(std::size_t index) const;

    /// Whether this entry was marked to stay so, since the image was opened. Thread-safe.
    [[nodiscard]] bool forgotten(std::size_t index) const;

private:
    struct Bitmap {
        Bitmap(format::BitmapEntry from, std::size_t position, HostOffset flags)
            : entry(std::move(from)), index(position), flags_at(flags) {}
        format::BitmapEntry entry;
        std::size_t index = 0;
        HostOffset flags_at;
        std::atomic<bool> kept = false;
        RecordedBits recorded = {};
        RecordedBits has_place = {};  // one for each entry of the bitmap's table
    };

    /// A bitmap that could be believed when its size began to change.
    struct Resize {
        format::BitmapEntry entry;          // as it was
        HostOffset at;                      // of the entry
        Bitmap* enabled = nullptr;          // null: it is disabled, and marked only meanwhile
        HostOffset new_table = {};          // 0: the old one does
        std::optional<Change> change = {};  // that takes the new table
        bool given_up = false;
        [[nodiscard]] HostOffset flags_at() const { return at + format::BitmapEntry::flags_at; }
    };

    [[nodiscard]] const Bitmap* find(std::size_t index) const;
    Result<void> mark_in_use();
    Result<void> write_flags(HostOffset flags_at, std::uint32_t flags);
    Result<void> save_cluster(const Bitmap& bitmap, std::uint64_t index, std::span<const std::uint64_t> recorded);
    Result<void> make_place(Bitmap& bitmap, std::uint64_t index);
    Result<void> add_cluster(HostOffset table_entry, std::span<const std::byte> bits);

    [[nodiscard]] std::uint64_t entries_for(const format::BitmapEntry& entry, std::uint64_t size) const;
    [[nodiscard]] std::uint64_t table_bytes(std::uint64_t entries) const;
    Result<void> find_true_bitmaps(std::uint64_t size);
    Result<void> prepare(Resize& bitmap, std::uint64_t size);
    Result<void> clear_behind_end(const format::BitmapEntry& entry);
    Result<void> extend_table(Resize& bitmap, std::uint64_t entries);
    Result<void> change_entries(std::uint64_t size);
    Result<void> drop_old(Resize& bitmap, std::uint64_t entries);
    Result<void> unmark_disabled();

    WritableMetadata& writable_;
    Metadata& metadata_;
    std::deque<Bitmap> enabled_;  // that were not in use when the image was opened, by their indices
    std::uint64_t memory_ = 0;    // that is left for bits
    std::vector<Resize> resizing_;
    std::unique_lock<std::mutex> no_places_;  // of place_mutex_, while tables move
    bool marked_ = false;                     // some may be
    std::atomic<bool> all_marked_ = false;    // durably
    std::mutex mark_mutex_;
    std::mutex place_mutex_;
    std::atomic<bool> ever_marked_ = false;
};

}  // namespace qcow::qcow2
