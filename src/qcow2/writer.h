#pragma once
// An image that is open for writing: its requests, from the first change to the close.

#include <memory>
#include <mutex>
#include <optional>
#include <span>

#include "base/request_gate.h"
#include "qcow/bitmaps.h"
#include "qcow2/compressed_writes.h"
#include "qcow2/resizing.h"
#include "qcow2/snapshot_changes.h"

namespace qcow::qcow2 {

/// Performs the requests of a guest. It marks the image before the first one, records what they change in the bitmaps,
/// and flushes where much was dropped. How data and entries change is up to CopyOnWrite, Zeroing, CompressedWrites
/// and Resizing.
///
/// Thread safety: functions may be called from any number of threads, where they do not say otherwise.
class Writer {
public:
    /// `active` reads the active mapping, and outlives it. Damage that requests meet there, also those that only read,
    /// marks the image as corrupt.
    Writer(std::shared_ptr<ImageParts> parts, View& active, const WriteOptions& options);
    Writer(const Writer&) = delete;
    Writer& operator=(const Writer&) = delete;
    ~Writer();

    /// Reads what writing needs. Errors: Errc::corrupt, unsupported, encrypted: why the image cannot be written.
    Result<void> open();

    /// What becomes of the contents that the guest sees.
    enum class Contents : bool {
        change,
        stay,  ///< what is stored was read from the image, and is still there: bitmaps record nothing
    };

    // See Disk and Image. Ranges have been verified; of a discard they are whole clusters.
    Result<void> write(GuestOffset at, ConstBuffers from, Contents contents = Contents::change);
    Result<void> write_zeroes(GuestOffset at, std::uint64_t length, Disk::Zeroes zeroes,
                              Contents contents = Contents::change);
    Result<void> discard(GuestOffset at, std::uint64_t length);
    Result<void> write_compressed(GuestOffset at, std::span<const std::byte> from, std::optional<int> level,
                                  Contents contents = Contents::change);
    Result<void> resize(std::uint64_t size);
    Result<SnapshotInfo> create_snapshot(const std::string& name);
    Result<void> apply_snapshot(std::string_view id_or_name);
    Result<void> remove_snapshot(std::string_view id_or_name);
    Result<void> rename_snapshot(std::string_view id_or_name, const std::string& name);
    Result<void> change_backing(const std::string& name, std::optional<Format> format);
    /// Meanwhile, nobody uses bitmaps().
    Result<void> change_bitmaps(std::span<const BitmapAction> actions);
    Result<void> make_empty();
    Result<void> complete_snapshots();
    Result<void> expand_zeroes();
    Result<void> flush() { return metadata_.flush(); }
    Result<void> survive_in(SurvivingMemory memory);

    /// Flushes, saves the bitmaps, and gives back everything that is only reserved. No other request may be in flight.
    Result<void> settle();

    /// Ends the file with the last cluster in use, where tables were dropped. After settle(), and for the last time.
    Result<void> cut_file();

    /// Requests that read hold one of these, so that nothing that they may be using is reused.
    Epochs& epochs() { return metadata_.epochs(); }

    [[nodiscard]] const DirtyBitmaps& bitmaps() const { return bitmaps_; }

private:
    template <class Work>
    Result<void> request(Work&& work);
    template <class Work>
    std::invoke_result_t<Work> change_whole(Work&& work);
    Result<void> zero(GuestOffset at, std::uint64_t length, Zeroing::Mode mode, Contents contents);
    Result<void> begin(GuestOffset at, std::uint64_t length, Contents contents);
    Result<void> begin_whole();
    Result<void> begin_first();
    Result<void> rebuild();
    Result<void> clear_unknown_features();
    Result<void> save_bitmaps();

    // First what is aligned to cache lines.
    RequestGate gate_;
    WritableMetadata metadata_;
    std::shared_ptr<ImageParts> parts_;
    View& active_;
    DirtyBitmaps bitmaps_;
    ActiveMapping mapping_;
    CopyOnWrite writes_;
    Zeroing zeroing_;
    CompressedWrites compressed_;
    Resizing resizing_;
    SnapshotChanges snapshots_;
    std::mutex begin_mutex_;
    std::mutex whole_mutex_;  // one change at a time of what concerns the whole image: its size, snapshots, bitmaps
    bool verifies_refcounts_;
    bool discards_;
    bool dropped_tables_ = false;
    bool recounted_ = false;           // what nothing in the file refers to has been freed
    std::atomic<bool> begun_ = false;  // the first change was made: features that are not known are off
};

}  // namespace qcow::qcow2
