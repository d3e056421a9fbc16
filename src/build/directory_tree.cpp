// Directories of this machine as trees.

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>

#include "base/bits.h"
#include "build/file_content.h"
#include "build/tree.h"
#include "qcow/text.h"
#include "storage/file.h"

namespace qcow {
namespace {

/// The directory that a tree is from.
struct SourceRoot {
    std::string path;
    FileDescriptor fd{-1};
    // Paths below it, with a slash behind; the first one is empty. References to them stay valid.
    std::deque<std::string> directories;
    // The names of files, each with a zero behind. There may be millions, and blocks of them take the least memory.
    std::deque<std::string> names;

    /// Keeps a name as long as this lives.
    const char* keep(const std::string& name) {
        constexpr std::size_t block_bytes = 64 * KiB;
        if (names.empty() || names.back().capacity() - names.back().size() <= name.size())
            names.emplace_back().reserve(block_bytes);
        auto& block = names.back();
        const auto at = block.size();
        block.append(name.c_str(), name.size() + 1);
        return block.data() + at;
    }
};

std::unexpected<Error> changed(const std::string& path) {
    return fail(Errc::io, printable(path), "the file changed while the disk was built; build it again");
}

std::unexpected<Error> vanished_or(const std::string& path, std::string_view action, int error) {
    if (error == ENOENT)
        return fail(Errc::io, printable(path), "the file vanished while the disk was built; build it again");
    return system_error(action, path, error);
}

/// Opens a file below the directory, without following any symbolic link.
int open_beneath(int directory, const std::string& path) {
    constexpr int flags = O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NOATIME;
    for (const int without : {0, O_NOATIME}) {  // O_NOATIME is for the owner and root
        open_how how = {};
        how.flags = static_cast<std::uint64_t>(flags & ~without);
        how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
        auto fd = static_cast<int>(syscall(SYS_openat2, directory, path.c_str(), &how, sizeof how));
        if (fd < 0 && errno == ENOSYS) fd = openat(directory, path.c_str(), flags & ~without);
        if (fd >= 0 || errno != EPERM) return fd;
    }
    return -1;
}

/// How a file was when it was listed.
struct Version {
    explicit Version(const struct stat& status)
        : inode(status.st_ino),
          size(status.st_size),
          seconds(status.st_mtim.tv_sec),
          nanoseconds(static_cast<std::uint32_t>(status.st_mtim.tv_nsec)) {}
    ino_t inode;
    off_t size;
    std::int64_t seconds;
    std::uint32_t nanoseconds;

    friend bool operator==(const Version&, const Version&) = default;
};

Result<void> read_version(int fd, const std::string& path, const Version& version, std::uint64_t at,
                          std::span<std::byte> to) {
    while (!to.empty()) {
        const auto got = pread(fd, to.data(), to.size(), static_cast<off_t>(at));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return system_error("cannot read", path, errno);
        if (got == 0) return changed(path);
        at += static_cast<std::uint64_t>(got);
        to = to.subspan(static_cast<std::size_t>(got));
    }
    struct stat status = {};
    if (fstat(fd, &status) != 0) return system_error("cannot read", path, errno);
    return Version(status) == version ? Result<void>() : changed(path);
}

/// A file below the directory of a tree. There may be millions, so it is small.
class ListedFile final : public Contents {
public:
    /// `name` lies in the root.
    ListedFile(std::shared_ptr<const SourceRoot> root, std::uint32_t directory, const char* name,
               const struct stat& status)
        : root_(std::move(root)), version_(status), name_(name), directory_(directory) {}

    Result<void> read(std::uint64_t at, std::span<std::byte> to) const override {
        const auto path = root_->directories[directory_] + name_;
        const FileDescriptor fd(open_beneath(root_->fd.get(), path));
        if (fd.get() < 0) return vanished_or(root_->path + "/" + path, "cannot open", errno);
        return read_version(fd.get(), path, version_, at, to);
    }

private:
    std::shared_ptr<const SourceRoot> root_;
    Version version_;
    const char* name_;
    std::uint32_t directory_;
};

/// A file that a specification names.
class NamedFile final : public Contents {
public:
    NamedFile(std::string path, FileDescriptor fd, const struct stat& status)
        : path_(std::move(path)), fd_(std::move(fd)), version_(status) {}

    Result<void> read(std::uint64_t at, std::span<std::byte> to) const override {
        return read_version(fd_.get(), path_, version_, at, to);
    }

private:
    std::string path_;
    FileDescriptor fd_;
    Version version_;
};

/// The runs of a file that has holes.
Result<std::vector<DataRun>> runs_of(int fd, const std::string& path, std::uint64_t size) {
    std::vector<DataRun> runs;
    for (std::uint64_t at = 0; at < size;) {
        const auto data = lseek(fd, static_cast<off_t>(at), SEEK_DATA);
        if (data < 0 && errno == ENXIO) break;
        const auto hole = data < 0 ? data : lseek(fd, data, SEEK_HOLE);
        if (data < 0 || hole <= data) return system_error("cannot find the holes", path, data < 0 ? errno : EIO);
        const auto end = std::min(static_cast<std::uint64_t>(hole), size);
        if (static_cast<std::uint64_t>(data) >= size) break;
        runs.push_back({static_cast<std::uint64_t>(data), end - static_cast<std::uint64_t>(data)});
        at = end;
    }
    return runs;
}

bool may_be_sparse(const struct stat& status) { return status.st_blocks < (status.st_size + 511) / 512; }

void fill(TreeInode& inode, const struct stat& status) {
    inode.mode = status.st_mode;
    inode.uid = status.st_uid;
    inode.gid = status.st_gid;
    inode.mtime = status.st_mtim.tv_sec;
    inode.nanoseconds = static_cast<std::uint32_t>(status.st_mtim.tv_nsec);
    if (S_ISREG(status.st_mode)) inode.size = static_cast<std::uint64_t>(status.st_size);
    if (S_ISCHR(status.st_mode) || S_ISBLK(status.st_mode)) {
        inode.make_rare().major = major(status.st_rdev);
        inode.make_rare().minor = minor(status.st_rdev);
    }
}

class DirectoryLister {
public:
    explicit DirectoryLister(std::shared_ptr<SourceRoot> root) : root_(std::move(root)) {}

    Result<void> list(int fd, TreeNode& to, std::uint32_t directory, unsigned depth) {
        const auto& path = root_->directories[directory];
        if (depth > deepest_directory || path.size() > longest_path)
            return fail(Errc::limit_exceeded, printable(path.substr(0, 64)), "directories are nested too deeply");
        for (auto& name : TRY(names_in(fd, path))) {
            struct stat status = {};
            if (fstatat(fd, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0)
                return vanished_or(full(path + name), "cannot look at", errno);
            auto& node = (*to.children)[name];
            if (!S_ISDIR(status.st_mode) && status.st_nlink > 1) {
                auto& known = linked_[{status.st_dev, status.st_ino}];
                if (!known) known = TRY(inode_of(fd, directory, name, status));
                node.inode = known;
                continue;
            }
            node.inode = TRY(inode_of(fd, directory, name, status));
            if (!S_ISDIR(status.st_mode)) continue;
            node.children = std::make_unique<Children>();
            const FileDescriptor child(openat(fd, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
            if (child.get() < 0) return vanished_or(full(path + name), "cannot open", errno);
            root_->directories.push_back(root_->directories[directory] + name + "/");
            TRY_VOID(list(child.get(), node, static_cast<std::uint32_t>(root_->directories.size() - 1), depth + 1));
        }
        return {};
    }

    /// The attributes of `name` in the directory; of the directory itself, if `name` is empty.
    Result<void> read_xattrs(int fd, const std::string& name, TreeInode& inode, const std::string& shown) {
        const auto path = fmt::format("/proc/self/fd/{}/{}", fd, name.empty() ? "." : name);
        names_.resize(std::max<std::size_t>(names_.size(), 65536));
        const auto length = llistxattr(path.c_str(), names_.data(), names_.size());
        if (length < 0 && errno != ENOTSUP && errno != EPERM)
            return vanished_or(full(shown), "cannot list the extended attributes", errno);
        for (ssize_t at = 0; at < length;) {
            const std::string key(names_.data() + at);
            at += static_cast<ssize_t>(key.size()) + 1;
            // Other attributes of "system." are what a file system says of itself.
            if (key.starts_with("system.") && !key.starts_with("system.posix_acl_")) continue;
            value_.resize(std::max<std::size_t>(value_.size(), 65536));
            const auto size = lgetxattr(path.c_str(), key.c_str(), value_.data(), value_.size());
            if (size < 0 && errno == ENODATA) continue;
            if (size < 0) return vanished_or(full(shown), "cannot read the extended attribute " + key, errno);
            inode.make_rare().xattrs.emplace_back(key, std::string(value_.data(), static_cast<std::size_t>(size)));
        }
        if (inode.rare) std::ranges::sort(inode.rare->xattrs);
        return {};
    }

private:
    [[nodiscard]] std::string full(const std::string& below) const { return root_->path + "/" + below; }

    Result<std::vector<std::string>> names_in(int fd, const std::string& path) {
        const int own = dup(fd);
        DIR* stream = own < 0 ? nullptr : fdopendir(own);
        if (stream == nullptr) return system_error("cannot list", full(path), errno);
        std::vector<std::string> names;
        errno = 0;
        while (const auto* entry = readdir(stream)) {
            const std::string_view name = entry->d_name;
            if (name != "." && name != "..") names.emplace_back(name);
        }
        const int error = errno;
        closedir(stream);
        if (error != 0) return system_error("cannot list", full(path), error);
        std::ranges::sort(names);
        return names;
    }

    Result<std::shared_ptr<TreeInode>> inode_of(int fd, std::uint32_t directory, const std::string& name,
                                                const struct stat& status) {
        auto inode = std::make_shared<TreeInode>();
        fill(*inode, status);
        const auto path = root_->directories[directory] + name;
        TRY_VOID(read_xattrs(fd, name, *inode, path));
        if (S_ISLNK(status.st_mode)) {
            char target[longest_path + 1];
            const auto length = readlinkat(fd, name.c_str(), target, sizeof target);
            if (length < 0) return vanished_or(full(path), "cannot read the link", errno);
            inode->make_rare().target.assign(target, static_cast<std::size_t>(length));
        }
        if (inode->size == 0) return inode;
        inode->content = std::make_unique<ListedFile>(root_, directory, root_->keep(name), status);
        if (may_be_sparse(status)) {
            const FileDescriptor file(open_beneath(fd, name));
            if (file.get() < 0) return vanished_or(full(path), "cannot open", errno);
            inode->make_rare().runs = TRY(runs_of(file.get(), full(path), inode->size));
        }
        return inode;
    }

    std::shared_ptr<SourceRoot> root_;
    std::map<std::pair<dev_t, ino_t>, std::shared_ptr<TreeInode>> linked_;
    std::string names_;  // memory, used again and again
    std::string value_;
};

}  // namespace

Result<void> fill_from_file(TreeInode& inode, const std::string& path) {
    FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    struct stat status = {};
    if (fd.get() < 0 || fstat(fd.get(), &status) != 0) return system_error("cannot open", path, errno);
    if (!S_ISREG(status.st_mode)) return fail(Errc::invalid_argument, printable(path), "is not a regular file");
    inode.mode = S_IFREG | (status.st_mode & 07777);
    inode.mtime = status.st_mtim.tv_sec;
    inode.nanoseconds = static_cast<std::uint32_t>(status.st_mtim.tv_nsec);
    inode.size = static_cast<std::uint64_t>(status.st_size);
    if (inode.size == 0) return {};
    if (may_be_sparse(status)) inode.make_rare().runs = TRY(runs_of(fd.get(), path, inode.size));
    inode.content = std::make_unique<NamedFile>(path, std::move(fd), status);
    return {};
}

Result<Tree> tree_of_directory(const std::string& path) {
    auto root = std::make_shared<SourceRoot>();
    root->path = path;
    root->fd.reset(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    struct stat status = {};
    if (root->fd.get() < 0 || fstat(root->fd.get(), &status) != 0) return system_error("cannot open", path, errno);
    root->directories.emplace_back();
    Tree tree;
    fill(*tree.root().inode, status);
    tree.root().implied = false;
    DirectoryLister lister(root);
    TRY_VOID(lister.read_xattrs(root->fd.get(), {}, *tree.root().inode, {}));
    TRY_VOID(lister.list(root->fd.get(), tree.root(), 0, 0));
    return tree;
}

}  // namespace qcow
