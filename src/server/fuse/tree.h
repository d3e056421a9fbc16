#pragma once
// The files of a mount.

#include <atomic>
#include <ctime>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "qcow/disk.h"

namespace qcow::fuse {

/// A file or a directory. Thread-safe.
class Node {
public:
    using Open = std::function<Result<std::shared_ptr<Disk>>()>;

    explicit Node(std::uint64_t parent) : parent_(parent) {}
    Node(std::uint64_t parent, std::shared_ptr<Disk> disk, bool writable, bool cached)
        : parent_(parent), writable_(writable), cached_(cached), owned_(std::move(disk)), disk_(owned_.get()) {}
    /// A read-only file whose disk is opened when it is needed.
    Node(std::uint64_t parent, Open open) : parent_(parent), open_(std::move(open)) {}

    [[nodiscard]] std::uint64_t parent() const { return parent_; }
    [[nodiscard]] bool is_directory() const { return disk_ == nullptr && open_ == nullptr; }
    [[nodiscard]] bool writable() const { return writable_; }
    /// Whether the kernel may keep the contents in its page cache.
    [[nodiscard]] bool cached() const { return cached_; }

    /// Returns the disk of a file. It lives as long as the node.
    Result<Disk*> disk();

    [[nodiscard]] timespec modified() const;
    void touch();

    /// The entries of a directory, in the order of their names. They do not change while it is mounted.
    std::map<std::string, std::uint64_t> entries;

private:
    const std::uint64_t parent_;
    const bool writable_ = false;
    const bool cached_ = true;
    const Open open_;
    std::mutex opening_;
    std::shared_ptr<Disk> owned_;
    std::atomic<Disk*> disk_ = nullptr;
    std::atomic<std::int64_t> modified_ = now();

    static std::int64_t now();
};

/// The nodes by number. The first one has number 1, and is the root.
class Tree {
public:
    /// The disk alone.
    static Tree of_file(std::shared_ptr<Disk> disk, bool writable);
    /// A directory with the disk, its snapshots and its partitions.
    static Result<Tree> of_directory(const std::shared_ptr<Disk>& disk, bool writable);

    /// Returns null if there is no such node.
    [[nodiscard]] Node* find(std::uint64_t number) const {
        return number - 1 < nodes_.size() ? nodes_[number - 1].get() : nullptr;
    }

private:
    template <class... Arguments>
    std::uint64_t add(Arguments&&... arguments) {
        nodes_.push_back(std::make_unique<Node>(std::forward<Arguments>(arguments)...));
        return nodes_.size();
    }
    std::uint64_t add_directory(std::uint64_t parent, const std::string& name);
    Result<void> add_snapshots(const std::shared_ptr<Disk>& disk, std::uint64_t directory);
    Result<void> add_partitions(const std::shared_ptr<Disk>& disk, bool writable, std::uint64_t directory);

    std::vector<std::unique_ptr<Node>> nodes_;
};

}  // namespace qcow::fuse
