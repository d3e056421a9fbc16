#pragma once
// The guest's view of an image: its active state, or one of its snapshots.

#include <memory>
#include <span>

#include "qcow/disk.h"
#include "qcow2/mapping.h"

namespace qcow::qcow2 {

/// Reading and mapping through one L1 table. Thread-safe.
class View {
public:
    View(std::shared_ptr<const Core> core, HostOffset l1_table) : core_(std::move(core)), mapping_(*core_, l1_table) {}

    [[nodiscard]] Result<void> read(GuestOffset at, std::span<std::byte> to) const;
    [[nodiscard]] Result<Extent> extent(GuestOffset at, std::uint64_t limit) const;

    /// Errc::encrypted or not_found where the guest's bytes are out of reach.
    [[nodiscard]] Result<void> verify_readable() const;

    [[nodiscard]] const Mapping& mapping() const { return mapping_; }
    [[nodiscard]] Mapping& mapping() { return mapping_; }

private:
    [[nodiscard]] Result<void> read_data(HostOffset host, GuestOffset at, std::span<std::byte> to) const;
    [[nodiscard]] Result<void> read_one_compressed(const Mapped& mapped, GuestOffset at, std::span<std::byte> to) const;

    std::shared_ptr<const Core> core_;
    Mapping mapping_;
};

}  // namespace qcow::qcow2
