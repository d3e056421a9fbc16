#pragma once
// A new qcow2 image, written from front to back in guest order.

#include <memory>
#include <mutex>
#include <vector>

#include "codec/compressor.h"
#include "disk/copy_target.h"
#include "disk/encrypted.h"
#include "format/entries.h"
#include "luks/volume.h"
#include "qcow/create.h"
#include "qcow2/layout.h"
#include "qcow2/refcount_writer.h"

namespace qcow::qcow2 {

/// Lays the file out as header, L1 table, then data with each L2 table and refcount block behind what it describes; the
/// refcount table last. The header is written at the very end: until then the file is no image. What is handed over
/// decides the layout, and nothing else.
class Builder final : public CopyTarget {
public:
    static Result<std::unique_ptr<Builder>> begin(NewImageFiles files, const CreateOptions& options,
                                                  const ConvertOptions& convert);

    [[nodiscard]] std::uint64_t block_size() const override { return geometry_.cluster_size(); }
    [[nodiscard]] bool any_order() const override { return false; }  // the same source gives the same bytes
    Result<void> prepare(Piece& piece) const override;
    Result<void> write(Piece& piece) override;
    Result<void> complete(const Piece& piece) override;
    Result<void> write_zeroes(GuestOffset at, std::uint64_t length) override;
    Result<std::uint64_t> copy_from(GuestOffset at, const Storage& source, HostOffset from,
                                    std::uint64_t length) override;

    /// Maps all of the disk to clusters, where the options ask for it. For an image without contents.
    Result<void> preallocate();

    /// Writes the tables and the header: now it is an image.
    Result<void> finish();

private:
    // The bitmap of an extended entry; others have none.
    static constexpr std::uint64_t all_subclusters_allocated = 0xffff'ffff;
    static constexpr std::uint64_t all_subclusters_zero = 0xffff'ffff'0000'0000;

    Builder(NewImageFiles files, const CreateOptions& options, ConvertOptions convert, format::Header header,
            std::optional<luks::NewHeader> encryption);

    void prepare_cluster(Piece& piece, std::size_t begin, codec::Compressor* compressor,
                         std::span<const std::byte> backing) const;
    [[nodiscard]] std::unique_ptr<codec::Compressor> take_compressor() const;
    Result<bool> read_backing(GuestOffset at, std::span<std::byte> to) const;
    [[nodiscard]] bool passes_over(const Error& error) const;

    Result<void> write_encrypted(HostOffset host, std::span<const std::byte> bytes);
    /// `marks`: what the entries have in addition to the place.
    Result<HostOffset> add_data(GuestOffset at, std::uint64_t length,
                                format::L2Entry marks = {0, all_subclusters_allocated});
    Result<void> add_nothing(GuestOffset at, std::uint64_t length);
    Result<void> add_zeroes(GuestOffset at, std::uint64_t length);
    Result<void> reserve(GuestOffset at, std::uint64_t length, std::uint64_t bitmap);
    Result<void> add_compressed(GuestOffset at, std::span<const std::byte> stream);
    HostOffset place_stream(std::uint64_t length);
    Result<void> write_pending();
    Result<void> set_entries(GuestOffset at, std::uint64_t clusters, format::L2Entry first, std::uint64_t step);
    Result<void> write_l2_table();

    NewImageFiles files_;
    ConvertOptions convert_;
    Preallocation preallocation_;
    format::Header header_;
    EmptyClusters empty_;
    format::Geometry geometry_;
    RefcountWriter refcounts_;
    std::optional<luks::NewHeader> luks_;
    std::unique_ptr<EncryptedBytes> encryption_;  // null: not encrypted
    std::vector<std::byte> l1_;
    std::vector<std::byte> l2_;   // the table that is being filled
    std::uint64_t l2_index_ = 0;  // which one it is, in the L1 table
    bool l2_used_ = false;

    HostOffset stream_end_;  // where the next compressed stream may go on; 0: nowhere
    std::uint64_t streams_in_cluster_ = 0;
    HostOffset pending_at_;  // streams that lie one behind the other are written at once
    std::vector<std::byte> pending_;

    mutable std::mutex compressors_mutex_;
    mutable std::vector<std::unique_ptr<codec::Compressor>> compressors_;  // those that no thread is using
};

}  // namespace qcow::qcow2
