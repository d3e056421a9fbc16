#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>

#include "base/try.h"
#include "storage/file.h"

namespace qcow {
namespace {

namespace fs = std::filesystem;

/// Where a symbolic link leads, if anywhere yet, so that the link stays and its target is replaced.
fs::path target_of(fs::path path) {
    constexpr int max_links = 40;  // as the kernel's
    std::error_code error;
    for (int i = 0; i < max_links && fs::is_symlink(path, error); ++i) {
        path = path.parent_path() / fs::read_symlink(path, error);
    }
    return path;
}

/// A name beside the target that nothing else has, and that is as short as the longest file name allows.
std::string part_name(const fs::path& target) {
    static std::atomic<unsigned> count = 0;
    return (target.parent_path() / fmt::format(".{}-{}.part", getpid(), count++)).string();
}

/// A file in `directory` without a name; -1, and errno, where the file system cannot make one.
int open_unnamed(const fs::path& directory) {
    return open(directory.empty() ? "." : directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0666);
}

}  // namespace

struct NewFile::State {
    std::string path;
    std::string part;     // a name of its own, until it gets that of the target
    bool linked = false;  // whether it has that name already
    FileDescriptor fd{-1};
    std::shared_ptr<Storage> storage;
    std::shared_ptr<Storage> replaced;  // the file that has the name now: held, with its lock, until then
    std::optional<mode_t> mode;         // of that file
    bool in_place = false;
    bool published = false;
};

NewFile::NewFile(std::unique_ptr<State> state) : state_(std::move(state)) {}
NewFile::NewFile(NewFile&&) noexcept = default;

NewFile::~NewFile() {
    if (state_ && state_->linked) unlink(state_->part.c_str());
}

const std::shared_ptr<Storage>& NewFile::storage() const { return state_->storage; }
bool NewFile::starts_as_zeros() const { return !state_->in_place; }

Result<NewFile> NewFile::begin(const std::string& path) {
    if (path.empty()) return fail(Errc::invalid_argument, "", "an empty file name");
    const auto target = target_of(path);
    NewFile file(std::make_unique<State>());
    auto& state = *file.state_;
    state.path = target.string();
    state.part = part_name(target);

    struct stat there = {};
    if (stat(state.path.c_str(), &there) == 0) {
        state.replaced = TRY(open_file(path, {.writable = true}));
        state.mode = there.st_mode & 07777;
        if (S_ISBLK(there.st_mode)) {
            state.storage = std::move(state.replaced);
            state.in_place = true;
            return file;
        }
    }
    int fd = open_unnamed(target.parent_path());
    if (fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL)) {
        fd = open(state.part.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0666);
        state.linked = fd >= 0;
    }
    if (fd < 0) return system_error("cannot create", path, errno);
    state.fd.reset(fd);
    FileDescriptor copy(fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (copy.get() < 0) return system_error("cannot create", path, errno);
    state.storage = TRY(file_storage(std::move(copy), path, {.writable = true}));
    return file;
}

Result<void> NewFile::publish(Contents contents) {
    auto& state = *state_;
    if (state.published) return {};
    if (contents == Contents::durable) TRY_VOID(state.storage->flush());
    if (state.in_place) return {};
    // Somebody may have made, and be using, a file of that name meanwhile.
    struct stat there = {};
    if (!state.replaced && stat(state.path.c_str(), &there) == 0) {
        state.replaced = TRY(open_file(state.path, {.writable = true}));
    }
    if (!state.linked) {
        const auto unnamed = fmt::format("/proc/self/fd/{}", state.fd.get());
        if (linkat(AT_FDCWD, unnamed.c_str(), AT_FDCWD, state.part.c_str(), AT_SYMLINK_FOLLOW) != 0)
            return system_error("cannot create", state.part, errno);
        state.linked = true;
    }
    if (state.mode && fchmod(state.fd.get(), *state.mode) != 0)
        return system_error("cannot set the permissions", state.path, errno);
    if (rename(state.part.c_str(), state.path.c_str()) != 0)
        return system_error("cannot put in place", state.path, errno);
    state.linked = false;
    state.published = true;
    state.replaced.reset();
    return {};
}

}  // namespace qcow
