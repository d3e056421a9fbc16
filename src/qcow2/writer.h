#pragma once
// The guest's writes: from a range of the virtual disk to data in host clusters and entries that lead there.

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <span>

#include "base/group_commit.h"
#include "base/range_locks.h"
#include "codec/compressor.h"
#include "qcow2/allocator.h"
#include "qcow2/dirty_bitmaps.h"
#include "qcow2/view.h"

namespace qcow::qcow2 {

/// Changes the active state of an image. Thread-safe.
///
/// A write to clusters that are this image's alone changes no metadata, and takes no lock. Every other change holds its
/// guest clusters against other changes: it reads what was there, takes host clusters, writes data, and only then
/// changes the entries, for which alone the L2 table is locked.
class Writer {
public:
    /// `active` outlives it. Damage that requests meet there, also those that only read, marks the image as corrupt.
    Writer(std::shared_ptr<Core> core, View& active, const WriteOptions& options);
    Writer(const Writer&) = delete;
    Writer& operator=(const Writer&) = delete;
    ~Writer();

    /// Reads what writing needs. Errc::corrupt, unsupported, encrypted: why the image cannot be written.
    Result<void> open();

    // See Disk and Image. Ranges have been verified.
    Result<void> write(GuestOffset at, std::span<const std::byte> from);
    Result<void> write_zeroes(GuestOffset at, std::uint64_t length, Disk::Zeroes zeroes);
    Result<void> discard(GuestOffset at, std::uint64_t length);
    Result<void> write_compressed(GuestOffset at, std::span<const std::byte> from, std::optional<int> level);
    Result<void> resize(std::uint64_t size);
    Result<void> flush();

    /// Flushes and gives back everything that is only reserved. No other request may be in flight.
    Result<void> settle();

    /// After settle(), and for the last time: a file whose disk became smaller ends with the last cluster in use.
    Result<void> cut_file();

    /// Requests that read hold one of these, so that nothing that they may be using is reused.
    Epochs& epochs() { return epochs_; }

    [[nodiscard]] const DirtyBitmaps& bitmaps() const { return bitmaps_; }

private:
    using L2Entry = format::L2Entry;
    /// What becomes of what lies there: `release` and `keep` record zeros, the latter in the place that there is;
    /// `discard` records them where something was; `forget` leaves nothing, where nothing shines through.
    enum class Zeroing : std::uint8_t { release, keep, discard, forget };

    /// Guest clusters that one L2 table maps, by number.
    struct Clusters {
        std::uint64_t first = 0;
        std::uint64_t end = 0;
    };

    Result<void> rebuild_refcounts();
    Result<void> verify_refcounts();
    Result<void> begin_writing(GuestOffset at, std::uint64_t length);
    Result<void> begin_first();
    Result<void> flush_if_full();
    Result<void> finish_request();
    [[nodiscard]] Result<void> verify_no_metadata(const Storage& file, HostOffset at, std::uint64_t length);
    [[nodiscard]] GuestOffset cluster_at(std::uint64_t cluster) const { return {cluster << cluster_bits_}; }
    [[nodiscard]] std::uint64_t l2_end(GuestOffset at) const;
    [[nodiscard]] std::uint64_t page_end(GuestOffset at) const;

    Result<void> write_mapped(GuestOffset at, std::span<const std::byte> from);
    Result<std::size_t> write_in_place(const Mapped& mapped, std::span<const std::byte> from);
    Result<std::size_t> write_and_map(GuestOffset at, std::span<const std::byte> from);
    Result<std::size_t> write_into_new(GuestOffset at, std::span<const std::byte> from, std::span<const L2Entry> old);
    Result<std::size_t> write_into_own(GuestOffset at, std::span<const std::byte> from, L2Entry old);
    Result<void> write_filled(HostOffset host, GuestOffset begin, GuestOffset end, GuestOffset at,
                              std::span<const std::byte> from, bool zeros_there);
    Result<void> read_old(GuestOffset at, std::span<std::byte> to);
    Result<bool> reads_as_zeros(GuestOffset at, std::uint64_t length);
    [[nodiscard]] bool needs_new_cluster(L2Entry entry) const;

    Result<format::L1Entry> l1_entry(GuestOffset at);
    Result<std::vector<L2Entry>> load_entries(Clusters clusters);
    Result<void> store_entries(std::uint64_t first, std::span<const L2Entry> entries, bool barrier);
    Result<HostOffset> l2_table_for(GuestOffset at);
    void retire(std::span<const L2Entry> entries);

    Result<std::uint64_t> zero_clusters(Clusters clusters, Zeroing zeroing);
    Result<std::pair<GuestOffset, GuestOffset>> zero_units(GuestOffset at, std::uint64_t length, Zeroing zeroing);
    Result<void> zero_data_file(GuestOffset at, std::uint64_t length);
    Result<void> zero_part(GuestOffset at, std::uint64_t length, Zeroing zeroing);
    Result<void> zero_range(GuestOffset at, std::uint64_t length, Zeroing zeroing);
    Result<void> zero_request(GuestOffset at, std::uint64_t length, Zeroing zeroing);
    Result<std::optional<L2Entry>> zeroed(std::uint64_t cluster, L2Entry old, std::uint64_t subclusters,
                                          Zeroing zeroing);
    Result<void> write_zero_bytes(GuestOffset at, std::uint64_t length);

    Result<bool> compress_cluster(GuestOffset at, std::span<const std::byte> from, codec::Compressor& compressor);

    Result<void> grow(std::uint64_t old_size, std::uint64_t size);
    Result<void> shrink(std::uint64_t size);
    Result<void> drop_l2_table(GuestOffset at);
    Result<void> grow_l1(std::uint64_t entries);
    Result<void> move_l1(HostOffset table, std::uint32_t entries);
    Result<void> set_header_size(std::uint64_t size);

    std::shared_ptr<Core> core_;
    View& active_;
    WriteOptions options_;
    unsigned cluster_bits_;
    format::EntryRules rules_;
    MetadataMap metadata_;
    WriteBack write_back_;
    Epochs epochs_;
    std::atomic<std::uint64_t> size_;  // of the disk; ahead of the header's while it grows
    bool raw_data_;                    // the external data file is to be a raw image by itself
    bool shrunk_ = false;
    Allocator allocator_;
    DirtyBitmaps bitmaps_;
    GroupCommit group_;
    RangeLocks clusters_;
    // Of the L2 table with this number, modulo their count. A change of size holds them all, and of a thread that holds
    // 64 ThreadSanitizer loses track.
    std::array<std::mutex, 32> l2_locks_;
    std::mutex begin_mutex_;
    std::mutex resize_mutex_;
    std::atomic<bool> begun_ = false;
};

}  // namespace qcow::qcow2
