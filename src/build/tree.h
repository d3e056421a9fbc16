#pragma once
// The files that a file system is to hold: listed, merged and changed in memory, before anything is written.

#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/try.h"
#include "qcow/build.h"
#include "qcow/disk.h"
#include "qcow/filesystem.h"

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

struct TreeInode;

inline constexpr std::size_t longest_name = 255;   // bytes
inline constexpr std::size_t longest_path = 4095;  // bytes
inline constexpr unsigned deepest_directory = 1000;

/// A name that lies in TreeNames.
class TreeName {
public:
    [[nodiscard]] std::string_view text() const { return {at_ + 1, static_cast<std::uint8_t>(*at_)}; }

private:
    friend class TreeNames;
    explicit TreeName(const char* at) : at_(at) {}
    const char* at_;  // a byte with the length, and the name
};

/// Names, one behind the other: memory for each of them would be larger than most names.
class TreeNames {
public:
    /// The name has at most `longest_name` bytes. The result is valid as long as this lives.
    TreeName keep(std::string_view name);

private:
    static constexpr std::size_t block_bytes = std::size_t{64} * 1024;
    std::vector<std::unique_ptr<char[]>> blocks_;
    std::size_t used_ = block_bytes;  // of the last one
};

/// A name in a directory, and what it leads to.
struct TreeEntry {
    TreeName name;
    TreeInode* inode = nullptr;
};

/// The files of a directory, sorted by the bytes of their names: the order does not depend on where they come from.
/// They are divided into short pieces, so that it is quick to add names in any order.
class Children {
public:
    bool implied = false;  ///< a directory that no source has, made for what is in it

    [[nodiscard]] auto entries() { return std::views::join(pieces_); }
    [[nodiscard]] auto entries() const { return std::views::join(pieces_); }
    [[nodiscard]] std::size_t size() const;

    /// What the name leads to; null if there is no such name.
    [[nodiscard]] TreeInode* find(std::string_view name) const;
    /// The entry of the name, which leads to nothing if it is new. It is valid until the next change of the directory.
    TreeEntry& place(std::string_view name, TreeNames& names);
    /// Returns whether the name was there.
    bool erase(std::string_view name);
    void clear() { pieces_.clear(); }

private:
    using Piece = std::vector<TreeEntry>;
    static constexpr std::size_t most_in_piece = 512;

    /// The piece that has the name, if any does. There is a piece.
    [[nodiscard]] std::size_t piece_of(std::string_view name) const;

    std::vector<Piece> pieces_;  // none is empty
};

/// What one or several names lead to. There may be millions, so it is small.
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
    const Contents* content = nullptr;  // of a regular file that is not empty; the tree keeps it
    std::unique_ptr<Rare> rare;
    std::unique_ptr<Children> children;  // of a directory
    // For whoever walks the tree, or writes the file system.
    std::uint32_t links = 0;
    std::uint32_t number = 0;

    [[nodiscard]] bool is_directory() const { return children != nullptr; }
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

class Tree {
public:
    Tree();

    [[nodiscard]] TreeInode& root() { return *root_; }
    [[nodiscard]] const TreeInode& root() const { return *root_; }

    /// An inode that has no name yet. A directory is empty. The inode belongs to root.
    TreeInode& new_inode(mode_t mode);

    /// The file with this path; null if there is none. Does not follow symbolic links.
    [[nodiscard]] TreeInode* find(std::string_view path);

    /// What `path` leads to: null if it is new. Its directories are made where they are missing. The result is valid
    /// until the directory changes. Errors: Errc::refused_by_policy for a path with ".."; Errc::invalid_argument for a
    /// path through a file, and for names that are too long.
    Result<TreeInode**> place(std::string_view path);

    /// The entry of a name in a directory of this tree, as Children::place.
    TreeEntry& place_in(TreeInode& directory, std::string_view name) {
        return directory.children->place(name, names_.front());
    }

    /// Removes a file, or a directory with all that is in it. Returns whether it was there.
    bool remove(std::string_view path);

    /// Keeps contents, or what they are read from.
    template <class Source>
    const Source* keep(std::shared_ptr<Source> source) {
        sources_.push_back(std::move(source));
        return static_cast<const Source*>(sources_.back().get());
    }

    /// Takes over what the inodes of another tree lie in, so that they can get names here.
    void adopt(Tree& other);

    /// Calls `visit` for each inode, once.
    void each_inode(const std::function<void(TreeInode&)>& visit);

    /// Forgets the files, to save memory. Their contents stay.
    void forget_files();

private:
    // References into them stay valid. The first ones are of this tree, the others of trees that it adopted.
    std::list<std::deque<TreeInode>> inodes_;
    std::list<TreeNames> names_;
    std::vector<std::shared_ptr<const void>> sources_;
    TreeInode* root_;
};

/// The parts of a path, without "." and empty ones. Errors: those of Tree::place.
Result<std::vector<std::string_view>> parts_of_path(std::string_view path);

/// Lists a directory of this machine. Symbolic links are not followed, and contents are not read.
Result<Tree> tree_of_directory(const std::string& path);

/// Lists an archive. Its contents are in an unnamed temporary file then.
Result<Tree> tree_of_archive(const std::string& path);

/// Lists a file system, which `disk` holds. Contents are read from the disk where they lie in it as they are.
Result<Tree> tree_of_files(std::shared_ptr<Disk> disk, std::unique_ptr<FileSystem> files);

/// Puts `upper` over `lower`, as OCI's and overlayfs's layers: with their whiteouts.
Result<void> put_layer(Tree& lower, Tree upper);

/// Carries out an entry of a list of files.
Result<void> apply_file(Tree& tree, const FileSpec& file);

}  // namespace qcow
