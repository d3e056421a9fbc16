#include "server/fuse/tree.h"

#include <fmt/format.h>

#include "base/within_memory.h"
#include "qcow/filesystem.h"
#include "qcow/image.h"
#include "qcow/mount.h"
#include "server/fuse/names.h"

namespace qcow::fuse {

Result<Disk*> Node::disk() {
    if (auto* const known = disk_.load()) return known;
    const std::lock_guard lock(opening_);
    if (owned_ == nullptr) {
        owned_ = TRY(open_());
        disk_ = owned_.get();
    }
    return disk_.load();
}

std::int64_t Node::now() {
    timespec time = {};
    clock_gettime(CLOCK_REALTIME_COARSE, &time);
    return time.tv_sec * std::int64_t{1'000'000'000} + time.tv_nsec;
}

timespec Node::modified() const {
    const auto time = modified_.load(std::memory_order_relaxed);
    return {static_cast<std::time_t>(time / 1'000'000'000), time % 1'000'000'000};
}

void Node::touch() { modified_.store(now(), std::memory_order_relaxed); }

Tree Tree::of_file(std::shared_ptr<Disk> disk, bool writable) {
    Tree tree;
    tree.add(1, std::move(disk), writable, true);
    return tree;
}

Result<Tree> Tree::of_directory(const std::shared_ptr<Disk>& disk, bool writable) {
    Tree tree;
    const auto root = tree.add(1);
    // What is written through one file must be seen through the others. The kernel has a page cache for each file.
    tree.find(root)->entries["disk"] = tree.add(root, disk, writable, !writable);
    TRY_VOID(tree.add_partitions(disk, writable, tree.add_directory(root, "partitions")));
    TRY_VOID(tree.add_snapshots(disk, tree.add_directory(root, "snapshots")));
    return tree;
}

std::uint64_t Tree::add_directory(std::uint64_t parent, const std::string& name) {
    return find(parent)->entries[name] = add(parent);
}

Result<void> Tree::add_partitions(const std::shared_ptr<Disk>& disk, bool writable, std::uint64_t directory) {
    const auto table = TRY(list_partitions(*disk));
    for (const auto& partition : table.partitions) {
        if (partition.start.value >= disk->size()) continue;
        const auto bytes = std::min(partition.bytes, disk->size() - partition.start.value);
        auto part = TRY(window(disk, {partition.start, bytes}));
        find(directory)->entries[std::to_string(partition.number)] =
            add(directory, std::move(part), writable, !writable);
    }
    return {};
}

Result<void> Tree::add_snapshots(const std::shared_ptr<Disk>& disk, std::uint64_t directory) {
    const auto image = std::dynamic_pointer_cast<Image>(disk);
    if (image == nullptr) return {};
    for (const auto& snapshot : TRY(image->info()).snapshots) {
        auto& entries = find(directory)->entries;
        auto name = snapshot_file_name(snapshot.name);
        if (name.empty() || entries.contains(name)) name = id_file_name(snapshot.id);
        if (name.empty() || entries.contains(name)) continue;  // the image is damaged: two snapshots have the same id
        entries[name] = add(
            directory, [image, selector = "snapshot.id=" + snapshot.id] { return image->snapshots().open(selector); });
    }
    return {};
}

}  // namespace qcow::fuse
