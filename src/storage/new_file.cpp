#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <filesystem>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "base/buffers.h"
#include "base/within_memory.h"
#include "qcow/files_in_use.h"
#include "storage/file.h"
#include "storage/pass_through.h"
#include "storage/unfinished.h"

namespace qcow {
namespace {

namespace fs = std::filesystem;

fs::path directory_of(const fs::path& target) {
    return target.has_parent_path() ? target.parent_path() : fs::path(".");
}

/// A name in the directory of the target that no file has. It is no longer than a file name may be.
std::string part_name(const fs::path& target) {
    std::random_device random;
    return (target.parent_path() / fmt::format(".{:08x}{:08x}.part", random(), random())).string();
}

/// Why `target`, which is there as `status` says, cannot be given to another file; empty: nothing is known against it.
std::string obstacle_to_replacing(const fs::path& target, const struct stat& status) {
    struct stat found = {};
    if (stat(target.c_str(), &found) != 0 || identity_of(found) != identity_of(status)) return "has no name of its own";
    struct statx file = {};
    if (statx(AT_FDCWD, target.c_str(), 0, STATX_BASIC_STATS, &file) == 0 &&
        (file.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0)
        return "is a mount point";
    struct statx directory = {};
    if (statx(AT_FDCWD, directory_of(target).c_str(), 0, STATX_BASIC_STATS, &directory) != 0) return {};
    if ((directory.stx_attributes & STATX_ATTR_APPEND) != 0) return "lies in a directory that nothing is removed from";
    const auto user = geteuid();
    if ((directory.stx_mode & S_ISVTX) != 0 && user != 0 && user != directory.stx_uid && user != status.st_uid)
        return "lies in a directory from which only its owner may remove it";
    return {};
}

/// Extended attributes that say something about the contents of a file, and not about the file.
bool is_about_contents(std::string_view name) {
    constexpr std::array names = {"security.capability", "security.ima", "security.evm"};
    return std::ranges::find(names, name) != names.end();
}

void copy_extended_attributes(const char* from, int to) {
    constexpr const char* acl = "system.posix_acl_access";
    std::vector<char> names(XATTR_LIST_MAX);
    std::vector<char> value(XATTR_SIZE_MAX);
    const ssize_t names_bytes = listxattr(from, names.data(), names.size());
    bool has_acl = false;
    for (ssize_t at = 0; at < names_bytes; at += static_cast<ssize_t>(std::string_view(&names[at]).size()) + 1) {
        const char* name = &names[at];
        if (is_about_contents(name)) continue;
        const ssize_t bytes = getxattr(from, name, value.data(), value.size());
        if (bytes >= 0) fsetxattr(to, name, value.data(), static_cast<std::size_t>(bytes), 0);
        has_acl |= std::string_view(name) == acl;
    }
    if (!has_acl) fremovexattr(to, acl);  // what the directory has handed down
}

/// Gives the file the owner, group, mode, ACL and extended attributes of another, as far as this process may.
void copy_attributes(const fs::path& from, const struct stat& status, int to) {
    mode_t mode = status.st_mode & 07777;
    if (fchown(to, status.st_uid, status.st_gid) != 0 && fchown(to, static_cast<uid_t>(-1), status.st_gid) != 0) {
        // Those of another group may not do what those of the old one might.
        struct stat now = {};
        if (fstat(to, &now) != 0 || now.st_gid != status.st_gid) mode &= ~S_IRWXG | ((mode & S_IRWXO) << 3);
    }
    copy_extended_attributes(from.c_str(), to);
    fchmod(to, mode);
}

/// A file in `directory` without a name; -1, and errno, where the file system cannot make one.
int open_unnamed(const fs::path& directory, mode_t mode) {
    return open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, mode);
}

bool link_to(int fd, const std::string& path) {
    const auto unnamed = fmt::format("/proc/self/fd/{}", fd);
    return linkat(AT_FDCWD, unnamed.c_str(), AT_FDCWD, path.c_str(), AT_SYMLINK_FOLLOW) == 0;
}

/// Makes the names in `directory` durable, of which one is that of `fd`.
Result<void> sync_directory(const fs::path& directory, int fd) {
    const FileDescriptor opened(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (opened.get() >= 0) {
        if (fsync(opened.get()) == 0) return {};
        if (errno != EINVAL) return system_error("cannot flush", directory.string(), errno);
    }
    // It may not be read, or its file system cannot flush a directory alone.
    if (syncfs(fd) != 0) return system_error("cannot flush", directory.string(), errno);
    return {};
}

/// A file or device that stays what it is until it is changed. Then a file is emptied first.
class InPlace final : public PassThrough {
public:
    InPlace(std::shared_ptr<Storage> inner, std::string path, bool block_device)
        : PassThrough(std::move(inner)), path_(std::move(path)), block_device_(block_device) {}

    [[nodiscard]] Result<std::uint64_t> size() const override { return is_empty() ? 0 : PassThrough::size(); }

    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        if (!is_empty()) return PassThrough::read(at, to);
        fill_zeros(to);
        return 0;
    }

    Result<void> write(HostOffset at, ConstBuffers from) override {
        TRY_VOID(change());
        return PassThrough::write(at, from);
    }

    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override {
        TRY_VOID(change());
        return PassThrough::write_zeroes(at, length);
    }

    Result<void> allocate(HostOffset at, std::uint64_t length) override {
        TRY_VOID(change());
        return PassThrough::allocate(at, length);
    }

    Result<void> resize(std::uint64_t size) override {
        if (!block_device_) TRY_VOID(change());  // a device stays as long as it is
        return PassThrough::resize(size);
    }

    [[nodiscard]] Result<Run> run(HostOffset at, std::uint64_t limit) const override {
        return is_empty() ? Run{false, limit} : PassThrough::run(at, limit);
    }

    Result<std::uint64_t> copy_from(const Storage& source, HostOffset from, HostOffset to,
                                    std::uint64_t length) override {
        TRY_VOID(change());
        return inner().copy_from(source, from, to, length);
    }

    [[nodiscard]] bool is_incomplete() const { return incomplete_; }

    void complete() {
        const std::lock_guard lock(mutex_);
        incomplete_ = false;
        listed_.reset();
    }

    /// Is called before each change, and where there was none.
    Result<void> change() {
        if (changed_) return {};
        const std::lock_guard lock(mutex_);
        if (changed_) return {};
        listed_.emplace(path_, Incomplete::written_in_place);
        incomplete_ = true;
        if (!block_device_) TRY_VOID(PassThrough::resize(0));
        changed_ = true;
        return {};
    }

private:
    [[nodiscard]] bool is_empty() const { return !changed_ && !block_device_; }

    std::string path_;
    bool block_device_;
    std::mutex mutex_;
    std::atomic<bool> changed_ = false;
    std::atomic<bool> incomplete_ = false;
    std::optional<Unfinished> listed_;
};

}  // namespace

struct NewFile::State {
    std::string path;
    std::string target;  // where that leads
    Existing existing = Existing::replaced;
    FileDescriptor fd{-1};
    std::string part;  // a name of its own, while it has one
    std::optional<Unfinished> listed;
    std::shared_ptr<Storage> storage;
    std::shared_ptr<Storage> replaced;  // the file that has the name now: held, with its lock, until then
    std::shared_ptr<InPlace> in_place;  // is the storage
    std::string obstacle;
    bool named = false;
    bool published = false;

    ~State() { drop_part(true); }

    static Result<NewFile> begin(const std::string& path, FilesInUse& in_use, const std::string& role,
                                 Existing existing);
    Result<void> publish(Contents contents);

    /// Opens the file that has the name, which locks it.
    [[nodiscard]] Result<std::shared_ptr<Storage>> open_existing(const struct stat& status) const {
        auto file = TRY(open_file(path, {.writable = true}));
        if (existing == Existing::only_if_empty && S_ISREG(status.st_mode) && status.st_size != 0) {
            return fail(Errc::invalid_argument, path,
                        "exists and is not empty; remove it, if its contents are not needed, or choose another name");
        }
        return file;
    }

    void take_part_name() {
        part = part_name(target);
        listed.emplace(part);
    }

    void drop_part(bool remove) {
        if (!part.empty() && remove) unlink(part.c_str());
        part.clear();
        listed.reset();
    }

    /// The new file, without a name where that is possible. Nobody else may open one that replaces another before it
    /// has that one's permissions.
    [[nodiscard]] int make() {
        const mode_t mode = replaced ? 0600 : 0666;
        const int unnamed = open_unnamed(directory_of(target), mode);
        if (unnamed >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)) return unnamed;
        take_part_name();
        const int made = open(part.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, mode);
        const int error = errno;
        if (made < 0) drop_part(false);
        errno = error;
        return made;
    }

    void write_in_place(std::shared_ptr<Storage> file, bool block_device, std::string why) {
        in_place = std::make_shared<InPlace>(std::move(file), path, block_device);
        storage = in_place;
        obstacle = std::move(why);
    }

    Result<void> take_name() {
        if (named) return {};
        // Of several who make a file of one name, one is the first.
        if (!replaced && part.empty()) {
            named = link_to(fd.get(), target);
            if (named) return {};
            if (errno != EEXIST) return system_error("cannot create", path, errno);
        }
        // Somebody may have made, and be using, another file of that name meanwhile.
        struct stat there = {};
        if (stat(target.c_str(), &there) == 0 && (!replaced || replaced->identity() != identity_of(there)))
            replaced = TRY(open_existing(there));
        if (part.empty()) {
            take_part_name();
            if (!link_to(fd.get(), part)) {
                const int error = errno;
                drop_part(false);
                return system_error("cannot create", path, error);
            }
        }
        if (rename(part.c_str(), target.c_str()) != 0) return system_error("cannot put in place", path, errno);
        named = true;
        drop_part(false);
        return {};
    }
};

NewFile::NewFile(std::unique_ptr<State> state) : state_(std::move(state)) {}
NewFile::NewFile(NewFile&&) noexcept = default;
NewFile::~NewFile() = default;

const std::shared_ptr<Storage>& NewFile::storage() const { return state_->storage; }
bool NewFile::starts_as_zeros() const { return !state_->in_place || !state_->obstacle.empty(); }
const std::string& NewFile::obstacle() const { return state_->obstacle; }
bool NewFile::is_incomplete() const { return state_->in_place && state_->in_place->is_incomplete(); }

Result<NewFile> NewFile::begin(const std::string& path, FilesInUse& in_use, const std::string& role,
                               Existing existing) {
    return within_memory([&] { return State::begin(path, in_use, role, existing); });
}

Result<NewFile> NewFile::State::begin(const std::string& path, FilesInUse& in_use, const std::string& role,
                                      Existing existing) {
    if (path.empty()) return fail(Errc::invalid_argument, "", "the name is empty");
    TRY_VOID(in_use.add(FilesInUse::Use::written, path, role));
    NewFile file(std::make_unique<State>());
    auto& state = *file.state_;
    state.path = path;
    state.target = link_target(path).string();
    state.existing = existing;

    struct stat there = {};
    if (stat(path.c_str(), &there) == 0) {
        auto old = TRY(state.open_existing(there));
        const bool block_device = S_ISBLK(there.st_mode);
        auto obstacle = block_device ? std::string() : obstacle_to_replacing(state.target, there);
        if (block_device || !obstacle.empty()) {
            state.write_in_place(std::move(old), block_device, std::move(obstacle));
            return file;
        }
        state.replaced = std::move(old);
    }
    const int fd = state.make();
    if (fd < 0 && state.replaced && (errno == EACCES || errno == EPERM || errno == EROFS)) {
        state.write_in_place(std::move(state.replaced), false, "lies in a directory that may not be changed");
        return file;
    }
    if (fd < 0) return system_error("cannot create", path, errno);
    state.fd.reset(fd);
    if (state.replaced) copy_attributes(state.target, there, fd);
    FileDescriptor copy(fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (copy.get() < 0) return system_error("cannot create", path, errno);
    state.storage = TRY(file_storage(std::move(copy), path, {.writable = true}));
    return file;
}

Result<void> NewFile::publish(Contents contents) {
    return within_memory([&] { return state_->publish(contents); });
}

Result<void> NewFile::State::publish(Contents contents) {
    if (published) return {};
    if (in_place) TRY_VOID(in_place->change());
    if (contents == Contents::durable) TRY_VOID(storage->flush());
    if (in_place) {
        in_place->complete();
    } else {
        TRY_VOID(take_name());
        if (contents == Contents::durable) TRY_VOID(sync_directory(directory_of(target), fd.get()));
    }
    published = true;
    replaced.reset();
    return {};
}

}  // namespace qcow
