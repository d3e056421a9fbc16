#pragma once
// Making, applying, removing and renaming internal snapshots.

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/request_gate.h"
#include "qcow2/active_mapping.h"
#include "qcow2/dirty_bitmaps.h"
#include "qcow2/image_parts.h"

namespace qcow::qcow2 {

/// Changes the snapshots of an image whose disk is in use.
///
/// A new snapshot shares the L2 tables of the disk. Requests wait only while the L1 table is copied and the marks are
/// taken away that say that the disk has the L2 tables for itself. From then on a request copies a table before it
/// changes it. So the tables of the snapshot stand still, and their references are counted while requests go on. What
/// requests drop meanwhile stays counted until that is done.
///
/// While refcounts and references disagree on disk, the image is marked as dirty. The header leads to the snapshot once
/// everything else is durable.
///
/// Thread safety: one thread at a time. Requests may be in flight.
class SnapshotChanges {
public:
    /// All outlive it. `gate` is what requests that change the image pass.
    SnapshotChanges(WritableMetadata& metadata, ImageParts& parts, ActiveMapping& mapping, DirtyBitmaps& bitmaps,
                    RequestGate& gate)
        : metadata_(metadata), parts_(parts), mapping_(mapping), bitmaps_(bitmaps), gate_(gate) {}

    // See Snapshots.
    Result<SnapshotInfo> create(const std::string& name);
    Result<void> apply(std::string_view id_or_name);
    Result<void> remove(std::string_view id_or_name);
    Result<void> rename(std::string_view id_or_name, const std::string& name);
    /// Gives all entries the extra data that version 3 requires.
    Result<void> complete();

private:
    /// The snapshot table as it is in the file.
    struct Table;

    [[nodiscard]] Result<void> verify_supported() const;
    [[nodiscard]] Result<Table> load() const;
    [[nodiscard]] Result<std::size_t> find(const Table& table, std::string_view id_or_name) const;
    Result<void> set_dirty(bool dirty);
    void mark(format::HeaderState& state, bool dirty) const;
    /// The bytes of a table of these entries. Errc::limit_exceeded.
    [[nodiscard]] Result<std::vector<std::byte>> join(std::span<const std::vector<std::byte>> entries) const;
    /// Writes a new snapshot table, and makes the header lead to it, with the dirty mark or without.
    Result<void> commit(Change& change, std::span<const std::vector<std::byte>> entries, bool dirty);
    Result<void> copy_mapping(HostOffset to, std::uint64_t bytes);
    Result<void> switch_to(const format::SnapshotEntry& snapshot);
    Result<void> remove_references(std::span<const std::uint64_t> l1);
    /// Corrects the COPIED flags, and takes the dirty mark away.
    Result<void> settle();

    WritableMetadata& metadata_;
    ImageParts& parts_;
    ActiveMapping& mapping_;
    DirtyBitmaps& bitmaps_;
    RequestGate& gate_;
    bool incomplete_ = false;  // a change failed so that only a rebuild makes refcounts and flags right: stays dirty
};

}  // namespace qcow::qcow2
