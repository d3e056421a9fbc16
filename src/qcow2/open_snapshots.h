#pragma once
// The snapshots of an image that are open as disks.

#include <atomic>
#include <map>
#include <memory>
#include <mutex>

#include "qcow/offset.h"

namespace qcow::qcow2 {

/// Tells the disks of a snapshot that it was removed. Thread-safe.
class OpenSnapshots {
public:
    using Removed = std::shared_ptr<const std::atomic<bool>>;

    /// Returns what becomes true when the snapshot with this L1 table is removed.
    Removed open(HostOffset l1_table) {
        const std::lock_guard lock(mutex_);
        auto& known = flags_[l1_table.value];
        auto flag = known.lock();
        if (!flag) known = flag = std::make_shared<std::atomic<bool>>(false);
        return flag;
    }

    void remove(HostOffset l1_table) {
        const std::lock_guard lock(mutex_);
        const auto found = flags_.find(l1_table.value);
        if (found == flags_.end()) return;
        if (const auto flag = found->second.lock()) *flag = true;
        flags_.erase(found);
    }

private:
    std::mutex mutex_;
    std::map<std::uint64_t, std::weak_ptr<std::atomic<bool>>> flags_;  // by the L1 tables' host offsets
};

}  // namespace qcow::qcow2
