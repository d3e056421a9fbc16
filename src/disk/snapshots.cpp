#include "qcow/snapshots.h"

#include "base/try.h"
#include "base/within_memory.h"
#include "qcow/image.h"

namespace qcow {

Result<std::vector<SnapshotInfo>> Snapshots::list() const {
    return within_memory([&] { return image_->do_list_snapshots(); });
}

Result<std::shared_ptr<Disk>> Snapshots::open(std::string_view id_or_name) {
    return within_memory([&] { return image_->do_open_snapshot(id_or_name); });
}

Result<SnapshotInfo> Snapshots::create(const std::string& name) {
    return within_memory([&]() -> Result<SnapshotInfo> {
        TRY_VOID(image_->verify_writable());
        return image_->do_create_snapshot(name);
    });
}

Result<void> Snapshots::apply(std::string_view id_or_name) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(image_->verify_writable());
        return image_->do_apply_snapshot(id_or_name);
    });
}

Result<void> Snapshots::remove(std::string_view id_or_name) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(image_->verify_writable());
        return image_->do_remove_snapshot(id_or_name);
    });
}

Result<void> Snapshots::rename(std::string_view id_or_name, const std::string& name) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(image_->verify_writable());
        return image_->do_rename_snapshot(id_or_name, name);
    });
}

}  // namespace qcow
