#pragma once
// The guest's view of an image: its active state, or one of its snapshots.

#include <functional>
#include <memory>
#include <span>

#include "qcow/disk.h"
#include "qcow2/image_parts.h"
#include "qcow2/mapping.h"

namespace qcow::qcow2 {

/// Reads through one L1 table: the active one, or a snapshot's.
///
/// Thread safety: all functions but on_damage() may be called from any number of threads.
class View {
public:
    /// See Mapping for `snapshot_l1`.
    explicit View(std::shared_ptr<const ImageParts> parts, std::optional<HostOffset> snapshot_l1 = {})
        : parts_(std::move(parts)), mapping_(parts_->metadata, snapshot_l1) {}

    /// What the guest bytes from `at` on are: see Mapping::lookup.
    [[nodiscard]] Result<Mapped> lookup(GuestOffset at, std::uint64_t limit) const;

    [[nodiscard]] Result<void> read(GuestOffset at, Buffers to) const;
    /// Reads bytes that are mapped like this. `to` is no longer than the run, or than the rest of a compressed cluster.
    [[nodiscard]] Result<void> read_mapped(const Mapped& mapped, GuestOffset at, Buffers to) const;
    [[nodiscard]] Result<Extent> extent(GuestOffset at, std::uint64_t limit) const;

    /// See Layer.
    [[nodiscard]] Result<Layer::Part> read_part(GuestOffset at, Buffers to) const;
    [[nodiscard]] Result<Extent> own_extent(GuestOffset at, std::uint64_t limit) const;

    /// Errc::encrypted or not_found where the guest's bytes are out of reach.
    [[nodiscard]] Result<void> verify_readable() const;

    /// What becomes of an Errc::corrupt that a lookup met; nothing: it is passed on. Not while requests are in flight.
    using OnDamage = std::function<std::unexpected<Error>(Error)>;
    void on_damage(OnDamage handler) { on_damage_ = std::move(handler); }

    [[nodiscard]] const Mapping& mapping() const { return mapping_; }

private:
    [[nodiscard]] Result<void> read_one_compressed(const Mapped& mapped, GuestOffset at, Buffers to) const;

    std::shared_ptr<const ImageParts> parts_;
    Mapping mapping_;
    OnDamage on_damage_;
};

}  // namespace qcow::qcow2
