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
#include <map>
#include <memory>

#include "base/bits.h"
#include "build/file_content.h"
#include "build/identity.h"
#include "build/tree.h"
#include "qcow/text.h"
#include "storage/file.h"

namespace qcow {
namespace {

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

/// How a file was when it was listed: a hash of its inode, size and time.
std::uint64_t version_of(const struct stat& status) {
    FilesHash hash;
    hash.add(std::uint64_t{status.st_ino});
    hash.add(static_cast<std::uint64_t>(status.st_size));
    hash.add(static_cast<std::uint64_t>(status.st_mtim.tv_sec));
    hash.add(static_cast<std::uint64_t>(status.st_mtim.tv_nsec));
    return hash.value();
}

Result<void> read_version(int fd, const std::string& path, std::uint64_t version, std::uint64_t at,
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
    return version_of(status) == version ? Result<void>() : changed(path);
}

/// The directory that a tree is from. References into it stay valid.
struct ListedDirectory {
    std::string path;
    FileDescriptor fd{-1};
    std::deque<std::string> directories;  // below it, with a slash behind; the first one is empty
};

/// A file below the directory of a tree. There may be millions, so it is small.
class ListedFile final : public Contents {
public:
    ListedFile(const ListedDirectory& root, std::uint32_t directory, TreeName name, std::uint64_t version)
        : root_(root), name_(name), version_(version), directory_(directory) {}

    Result<void> read(std::uint64_t at, std::span<std::byte> to) const override {
        const auto path = fmt::format("{}{}", root_.directories[directory_], name_.text());
        const FileDescriptor fd(open_beneath(root_.fd.get(), path));
        if (fd.get() < 0) return vanished_or(root_.path + "/" + path, "cannot open", errno);
        return read_version(fd.get(), path, version_, at, to);
    }

private:
    const ListedDirectory& root_;
    TreeName name_;
    std::uint64_t version_;
    std::uint32_t directory_;
};

/// A file that a specification names.
class NamedFile final : public Contents {
public:
    NamedFile(std::string path, FileDescriptor fd, const struct stat& status)
        : path_(std::move(path)), fd_(std::move(fd)), version_(version_of(status)) {}

    Result<void> read(std::uint64_t at, std::span<std::byte> to) const override {
        return read_version(fd_.get(), path_, version_, at, to);
    }

private:
    std::string path_;
    FileDescriptor fd_;
    std::uint64_t version_;
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
    explicit DirectoryLister(std::string path) { root_->path = std::move(path); }

    Result<Tree> run() {
        root_->fd.reset(::open(root_->path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        const int fd = root_->fd.get();
        struct stat status = {};
        if (fd < 0 || fstat(fd, &status) != 0) return system_error("cannot open", root_->path, errno);
        tree_.keep(root_);
        tree_.keep(files_);
        root_->directories.emplace_back();
        fill(tree_.root(), status);
        tree_.root().children->implied = false;
        TRY_VOID(read_xattrs(fd, {}, tree_.root(), {}));
        TRY_VOID(list(fd, tree_.root(), 0, 0));
        return std::move(tree_);
    }

private:
    Result<void> list(int fd, TreeInode& to, std::uint32_t directory, unsigned depth) {
        const auto& path = root_->directories[directory];
        if (depth > deepest_directory || path.size() > longest_path) {
            return fail(Errc::limit_exceeded, printable(path.substr(0, 64)),
                        fmt::format("directories are nested more than {} deep, or the path is longer than {} bytes",
                                    deepest_directory, longest_path));
        }
        for (const auto& name : TRY(names_in(fd, path))) {
            struct stat status = {};
            if (fstatat(fd, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0)
                return vanished_or(full(path + name), "cannot look at", errno);
            auto& entry = tree_.place_in(to, name);
            if (!S_ISDIR(status.st_mode) && status.st_nlink > 1) {
                auto& known = linked_[{status.st_dev, status.st_ino}];
                if (known == nullptr) known = TRY(inode_of(fd, directory, entry.name, status));
                entry.inode = known;
                continue;
            }
            auto& inode = *TRY(inode_of(fd, directory, entry.name, status));
            entry.inode = &inode;
            if (!inode.is_directory()) continue;
            const FileDescriptor child(openat(fd, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
            if (child.get() < 0) return vanished_or(full(path + name), "cannot open", errno);
            root_->directories.push_back(path + name + "/");
            TRY_VOID(list(child.get(), inode, static_cast<std::uint32_t>(root_->directories.size() - 1), depth + 1));
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

    Result<TreeInode*> inode_of(int fd, std::uint32_t directory, TreeName kept, const struct stat& status) {
        auto& inode = tree_.new_inode(status.st_mode);
        fill(inode, status);
        const std::string name(kept.text());
        const auto path = root_->directories[directory] + name;
        TRY_VOID(read_xattrs(fd, name, inode, path));
        if (S_ISLNK(status.st_mode)) {
            char target[longest_path + 1];
            const auto length = readlinkat(fd, name.c_str(), target, sizeof target);
            if (length < 0) return vanished_or(full(path), "cannot read the link", errno);
            inode.make_rare().target.assign(target, static_cast<std::size_t>(length));
        }
        if (inode.size == 0) return &inode;
        inode.content = &files_->emplace_back(*root_, directory, kept, version_of(status));
        if (may_be_sparse(status)) {
            const FileDescriptor file(open_beneath(fd, name));
            if (file.get() < 0) return vanished_or(full(path), "cannot open", errno);
            inode.make_rare().runs = TRY(runs_of(file.get(), full(path), inode.size));
        }
        return &inode;
    }

    std::shared_ptr<ListedDirectory> root_ = std::make_shared<ListedDirectory>();
    std::shared_ptr<std::deque<ListedFile>> files_ = std::make_shared<std::deque<ListedFile>>();
    Tree tree_;
    std::map<std::pair<dev_t, ino_t>, TreeInode*> linked_;
    std::string names_;  // memory, used again and again
    std::string value_;
};

}  // namespace

Result<void> fill_from_file(Tree& tree, TreeInode& inode, const std::string& path) {
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
    inode.content = tree.keep(std::make_shared<NamedFile>(path, std::move(fd), status));
    return {};
}

Result<Tree> tree_of_directory(const std::string& path) { return DirectoryLister(path).run(); }

}  // namespace qcow
