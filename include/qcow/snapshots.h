#pragma once
// The internal snapshots of an image.

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "qcow/disk.h"
#include "qcow/export.h"

namespace qcow {

class Image;
struct SnapshotInfo;

/// The internal snapshots of an open image. A handle: it must not outlive the image.
///
/// A snapshot is found by its id, else by its name. apply(), remove() and rename() refuse an id or a name that two
/// snapshots have: Errc::invalid_argument. An id that is another snapshot's name means the one with the id.
/// "snapshot.id=ID" and "snapshot.name=NAME" say which one is meant.
///
/// Changes need an image that is open for writing. They are durable when they return. A crash leaves the image as it
/// was before or as it is after the change, with its dirty mark if references must be counted again: the next writer
/// does that. (Version 2 has no such mark: qcow check then finds leaks and COPIED flags to correct. They do no harm.)
/// Errors of all changes: Errc::unsupported: the format has no snapshots, or the image has an external data file;
/// Errc::read_only, corrupt, no_space, io.
///
/// Thread safety: all functions may be called from any number of threads, and while requests of the disk are in flight.
/// Changes wait for each other.
class QCOW_API Snapshots {
public:
    explicit Snapshots(Image& image) : image_(&image) {}

    /// Returns the snapshots in the order of the file. Errors: Errc::corrupt: the table is damaged; Errc::io.
    [[nodiscard]] Result<std::vector<SnapshotInfo>> list() const;

    /// Returns a snapshot as a read-only disk. It keeps the image's files open. If the snapshot is removed, reading
    /// gives Errc::not_found. Errors: Errc::not_found; Errc::corrupt for a damaged snapshot table or L1 table.
    Result<std::shared_ptr<Disk>> open(std::string_view id_or_name);

    /// Makes a snapshot of the disk as it is at one point in time during the call: with all requests that returned
    /// before the call, without those that begin after it returned. Requests that change the disk are held at that
    /// point, while the L1 table is copied. `name`: 1 to 255 bytes. Errors: Errc::invalid_argument: another length;
    /// Errc::limit_exceeded: 65,536 snapshots, or the image's refcounts cannot count another reference.
    Result<SnapshotInfo> create(const std::string& name);

    /// Makes the disk what it was when the snapshot was made, and as large. The contents of the disk are lost; the
    /// snapshot stays. Enabled bitmaps record that the whole disk has changed. Requests that change the disk are held
    /// for the whole call. Requests past the smaller of the two sizes must not be in flight. Errors:
    /// Errc::limit_exceeded: the image's refcounts cannot count another reference.
    Result<void> apply(std::string_view id_or_name);

    /// Removes a snapshot, and frees what only it refers to. After an error the snapshot may be gone, and its space not
    /// yet free.
    Result<void> remove(std::string_view id_or_name);

    /// Gives a snapshot another name: 1 to 255 bytes.
    Result<void> rename(std::string_view id_or_name, const std::string& name);

private:
    Image* image_;
};

}  // namespace qcow
