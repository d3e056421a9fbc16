#pragma once
// The files that a file system is to hold: listed, merged and changed in memory, before anything is written.

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/try.h"
#include "qcow/build.h"
#include "qcow/disk.h"

namespace qcow {

/// The bytes of a regular file, which are read when they are copied.
class Contents {
public:
    Contents() = default;
    Contents(const Contents&) = delete;
    Contents& operator=(const Contents&) = delete;
    virtual ~Contents() = default;

    /// Fills all of `to`. Thread-safe. The range lies within the file's data. Errc::io: the file changed since it was
    /// listed.
    virtual Result<void> read(std::uint64_t at, std::span<std::byte> to) const = 0;
};

/// A run of a file that holds data. What is not in a run is a hole.
struct DataRun {
    std::uint64_t start = 0;  // bytes
    std::uint64_t length = 0;
};

/// What one or several names lead to.
struct TreeInode {
    /// What few files have.
    struct Rare {
        std::string target;  // of a symbolic link
        unsigned major = 0;  // of a device
        unsigned minor = 0;
        std::vector<std::pair<std::string, std::string>> xattrs;  // sorted by name
        std::optional<std::vector<DataRun>> runs;                 // of a sparse file
    };

    mode_t mode = 0;  // type and permissions
    std::uint32_t uid = 0;
    std::uint32_t gid = 0;
    std::uint32_t nanoseconds = 0;
    std::int64_t mtime = 0;
    std::uint64_t size = 0;             // of a regular file
    std::unique_ptr<Contents> content;  // of a regular file that is not empty
    std::unique_ptr<Rare> rare;
    // For whoever writes the file system.
    std::uint32_t links = 0;
    std::uint32_t number = 0;

    Rare& make_rare() {
        if (!rare) rare = std::make_unique<Rare>();
        return *rare;
    }
    /// The runs of a regular file.
    [[nodiscard]] std::vector<DataRun> runs() const {
        if (rare && rare->runs) return *rare->runs;
        return size == 0 ? std::vector<DataRun>() : std::vector<DataRun>{{0, size}};
    }
};

struct TreeNode;
/// The files of a directory, sorted by the bytes of their names: the order does not depend on where they come from.
using Children = std::map<std::string, TreeNode, std::less<>>;

/// A name, and what it leads to.
struct TreeNode {
    std::shared_ptr<TreeInode> inode;
    std::unique_ptr<Children> children;  // of a directory
    bool implied = false;                // a directory that no source has, made for what is in it

    [[nodiscard]] bool is_directory() const { return children != nullptr; }
};

inline constexpr std::size_t longest_name = 255;   // bytes
inline constexpr std::size_t longest_path = 4095;  // bytes
inline constexpr unsigned deepest_directory = 1000;

/// An empty directory that belongs to root.
TreeNode new_directory();

class Tree {
public:
    Tree() : root_(new_directory()) { root_.implied = true; }

    [[nodiscard]] TreeNode& root() { return root_; }
    [[nodiscard]] const TreeNode& root() const { return root_; }

    /// The file with this path; null if there is none. Does not follow symbolic links.
    [[nodiscard]] TreeNode* find(std::string_view path);

    /// The place of `path`, with its directories, which are made where they are missing. Errors:
    /// Errc::refused_by_policy for a path with ".."; Errc::invalid_argument for a path through a file, and for names
    /// that are too long.
    Result<TreeNode*> place(std::string_view path);

    /// Removes a file, or a directory with all that is in it. Returns whether it was there.
    bool remove(std::string_view path);

    /// Calls `visit` for each inode, once.
    void each_inode(const std::function<void(TreeInode&)>& visit);

private:
    TreeNode root_;
};

/// The parts of a path, without "." and empty ones. Errors: those of Tree::place.
Result<std::vector<std::string_view>> parts_of_path(std::string_view path);

/// Lists a directory of this machine. Symbolic links are not followed, and contents are not read.
Result<Tree> tree_of_directory(const std::string& path);

/// Lists an archive. Its contents are in an unnamed temporary file then.
Result<Tree> tree_of_archive(const std::string& path);

/// Lists the file system that a disk holds. Contents are read from the disk.
Result<Tree> tree_of_disk(std::shared_ptr<Disk> disk);

/// Puts `upper` over `lower`, as OCI's and overlayfs's layers: with their whiteouts.
Result<void> put_layer(Tree& lower, Tree upper);

/// Carries out an entry of a list of files.
Result<void> apply_file(Tree& tree, const FileSpec& file);

}  // namespace qcow
