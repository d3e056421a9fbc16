#pragma once
// Guest bytes that become zeros: by their entries where these can say it, as bytes where they cannot.

#include <cstdint>
#include <optional>
#include <utility>

#include "qcow2/copy_on_write.h"

namespace qcow::qcow2 {

/// Thread safety: all functions may be called from any number of threads.
class Zeroing {
public:
    using L2Entry = format::L2Entry;

    enum class Mode : std::uint8_t {
        release,  ///< records zeros, and gives up the storage
        keep,     ///< records zeros, in the place that there is
        discard,  ///< records zeros where something was stored, and gives up the storage
        forget,   ///< records nothing where nothing shines through, and gives up the storage
    };

    /// All outlive it.
    Zeroing(WritableMetadata& metadata, ImageParts& parts, ActiveMapping& mapping, CopyOnWrite& writes)
        : metadata_(metadata), parts_(parts), mapping_(mapping), writes_(writes), rules_(mapping.rules()) {}

    /// Makes the range zeros. It may end at the end of the disk, whose last cluster then counts as whole. Of a discard
    /// only whole clusters are made zeros. Errors: Errc::no_space, io, corrupt.
    Result<void> zero(GuestOffset at, std::uint64_t length, Mode mode);

    /// Of a disk without subclusters: makes the zeros that entries record from `at` on, where a cluster begins, ones
    /// that need no record. Returns the length of what it has looked at, whole clusters or up to the end of the disk.
    Result<std::uint64_t> expand(GuestOffset at, std::uint64_t limit);

private:
    Result<std::uint64_t> zero_clusters(GuestClusters clusters, Mode mode);
    Result<void> zero_part(GuestOffset at, GuestOffset end, Mode mode);
    Result<std::pair<GuestOffset, GuestOffset>> zero_units(GuestOffset at, GuestOffset end, Mode mode);
    Result<std::optional<L2Entry>> zeroed(std::uint64_t cluster, L2Entry old, std::uint64_t subclusters, Mode mode);
    Result<void> write_zero_bytes(GuestOffset at, GuestOffset end);
    Result<void> zero_data_file(GuestOffset at, std::uint64_t length);
    [[nodiscard]] std::uint64_t all_subclusters() const { return rules_.geometry.extended_l2 ? low_bits(32) : 1; }

    WritableMetadata& metadata_;
    ImageParts& parts_;
    ActiveMapping& mapping_;
    CopyOnWrite& writes_;
    const format::EntryRules& rules_;
};

}  // namespace qcow::qcow2
