#pragma once
// The persistent bitmaps of an image that is being written.

#include <cstdint>
#include <mutex>
#include <vector>

#include "qcow2/allocator.h"
#include "qcow2/bitmap_runs.h"

namespace qcow::qcow2 {

/// Keeps every enabled bitmap true, or marked as not to be trusted.
///
/// Before the first change each one is marked in_use on disk. From then on what changes is recorded in memory; save()
/// adds it to the bits in the file, and once that is durable clear_in_use() says so. Whenever power is lost, a bitmap
/// is marked or covers all changes. The bits get their place in the file when the first of them is recorded, so that
/// save() needs no space.
///
/// Enabled bitmaps that cannot be kept are marked and stay so: what is damaged or not understood, and what does not fit
/// into memory. For all bits there is a quarter of the image's share of the cache budget, on top of it, and at least
/// min_memory (which does for a disk of 2 TiB and bits for 64 KiB); earlier bitmaps of the directory come first.
/// Disabled ones, and those that are in_use already, stay as they are.
class DirtyBitmaps {
public:
    static constexpr std::uint64_t min_memory = 4 * MiB;

    DirtyBitmaps(Core& core, WriteBack& write_back, MetadataMap& metadata, Allocator& allocator)
        : core_(core), write_back_(write_back), metadata_(metadata), allocator_(allocator) {}

    /// Reads the directory. Errc::corrupt, io.
    Result<void> load();

    /// To be called before the first change, and before the first one after clear_in_use(). Durable.
    Result<void> mark_in_use();

    /// These guest bytes are going to change. Thread-safe; takes a lock only where bits get their place in the file.
    /// Errc::no_space, io: they must not change.
    Result<void> record(GuestOffset at, std::uint64_t length);

    /// Adds what was recorded to the bits in the file. Not durable before the next flush. No request may be in flight.
    Result<void> save();

    /// What save() did is durable. So is this.
    Result<void> clear_in_use();

    /// What was recorded for this entry of the directory; null: it is not kept. Thread-safe.
    [[nodiscard]] const RecordedBits* recorded(std::size_t index) const;

    /// Whether this entry was marked to stay so, since the image was opened. Thread-safe.
    [[nodiscard]] bool forgotten(std::size_t index) const;

private:
    struct Bitmap {
        format::BitmapEntry entry;
        std::size_t index = 0;
        HostOffset flags_at;
        bool kept = false;
        RecordedBits recorded = {};
        std::vector<std::atomic<bool>> has_place = {};  // by entries of the bitmap's table
    };

    [[nodiscard]] const Bitmap* find(std::size_t index) const;
    Result<void> write_flags(const Bitmap& bitmap, std::uint32_t flags);
    Result<void> save_cluster(const Bitmap& bitmap, std::uint64_t index,
                              std::span<const std::atomic<std::uint64_t>> recorded);
    Result<void> make_place(Bitmap& bitmap, std::uint64_t index);
    Result<void> add_cluster(HostOffset table_entry);

    Core& core_;
    WriteBack& write_back_;
    MetadataMap& metadata_;
    Allocator& allocator_;
    std::vector<Bitmap> enabled_;  // that were not in use when the image was opened, by their indices
    bool marked_ = false;
    std::mutex place_mutex_;
    std::atomic<bool> ever_marked_ = false;
};

}  // namespace qcow::qcow2
