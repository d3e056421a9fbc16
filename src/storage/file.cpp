#include <fcntl.h>
#include <fmt/format.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <optional>

#include "base/bits.h"
#include "base/buffers.h"
#include "base/within_memory.h"
#include "qcow/storage.h"
#include "storage/direct.h"
#include "storage/file.h"
#include "storage/file_lock.h"
#include "storage/overlapping_flushes.h"
#include "storage/zero_bytes.h"

namespace qcow {
namespace {

/// Whether the file system is a network's, so that its server may be able to copy by itself.
bool on_server(int fd) {
    constexpr long smb2 = 0xfe534d42;
    constexpr long ceph = 0x00c36400;
    struct statfs status = {};
    if (fstatfs(fd, &status) != 0) return false;
    const auto type = static_cast<long>(status.f_type);
    return type == NFS_SUPER_MAGIC || type == smb2 || type == ceph;
}

/// The front of a scatter list, as the system takes it.
class Vectors {
public:
    template <class Byte>
    explicit Vectors(BasicBuffers<Byte> buffers) {
        for (const auto piece : buffers) {
            vectors_[count_++] = {const_cast<std::byte*>(piece.data()), piece.size()};
            if (count_ == vectors_.size()) break;
        }
    }

    [[nodiscard]] const iovec* data() const { return vectors_.data(); }
    [[nodiscard]] int count() const { return static_cast<int>(count_); }

private:
    std::array<iovec, 64> vectors_;
    std::size_t count_ = 0;
};

class FileStorage final : public Storage {
public:
    FileStorage(FileDescriptor fd, std::string path, const struct stat& status, bool writable, std::uint64_t block)
        : fd_(std::move(fd)),
          path_(std::move(path)),
          identity_(identity_of(status)),
          block_device_(S_ISBLK(status.st_mode)),
          writable_(writable),
          block_(block) {}

    [[nodiscard]] const std::string& name() const override { return path_; }
    [[nodiscard]] std::string identity() const override { return identity_; }

    [[nodiscard]] Result<std::uint64_t> size() const override {
        if (block_device_) {
            std::uint64_t bytes = 0;
            if (ioctl(fd_.get(), BLKGETSIZE64, &bytes) != 0) return system_error("cannot tell the size", path_, errno);
            return bytes;
        }
        return static_cast<std::uint64_t>(TRY(status()).st_size);
    }

    [[nodiscard]] Result<std::uint64_t> allocated() const override {
        if (block_device_) return size();
        return static_cast<std::uint64_t>(TRY(status()).st_blocks) * 512;
    }

    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        std::size_t done = 0;
        const std::size_t possible =
            at.value > max_offset ? 0 : std::min<std::uint64_t>(to.size(), max_offset - at.value);
        while (done < possible) {
            const Vectors vectors(to.subspan(done, possible - done));
            const ssize_t n = preadv(fd_.get(), vectors.data(), vectors.count(), static_cast<off_t>(at.value + done));
            if (n < 0 && errno == EINTR) continue;
            if (n < 0)
                return system_error(fmt::format("cannot read {} bytes at {:#x}", to.size(), at.value), path_, errno);
            done += static_cast<std::size_t>(n);
            // Direct I/O that gives part of a block has met the end, and may not be asked for the rest of it.
            if (n == 0 || !is_aligned(static_cast<std::uint64_t>(n), block_)) break;
        }
        fill_zeros(to.subspan(done));
        return done;
    }

    Result<void> write(HostOffset at, ConstBuffers from) override {
        TRY_VOID(verify_writable());
        while (!from.empty()) {
            const Vectors vectors(from);
            const ssize_t n = pwritev(fd_.get(), vectors.data(), vectors.count(), static_cast<off_t>(at.value));
            if (n < 0 && errno == EINTR) continue;
            if (n < 0)
                return system_error(fmt::format("cannot write {} bytes at {:#x}", from.size(), at.value), path_, errno);
            at += static_cast<std::uint64_t>(n);
            from = from.subspan(static_cast<std::size_t>(n));
        }
        return {};
    }

    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override {
        TRY_VOID(verify_writable());
        const std::uint64_t end = TRY(size());
        length = at.value >= end ? 0 : std::min(length, end - at.value);
        if (length == 0) return {};
        if (block_device_) {
            // The kernel zeroes whole blocks of a device.
            const std::uint64_t before = std::min(length, -at.value % device_block);
            TRY_VOID(write_zero_bytes(*this, at, before));
            at += before;
            length -= before;
            const std::uint64_t behind = length % device_block;
            TRY_VOID(write_zero_bytes(*this, at + (length - behind), behind));
            length -= behind;
            if (length == 0) return {};
        }
        const auto offset = static_cast<off_t>(at.value);
        if (fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, static_cast<off_t>(length)) == 0)
            return {};
        // A full file system may have no room for the record of a hole; blocks that are there take zeros all the same.
        if (errno != EOPNOTSUPP && errno != ENODEV && errno != ENOSPC && errno != EDQUOT)
            return system_error(fmt::format("cannot zero {} bytes at {:#x}", length, at.value), path_, errno);
        return write_zero_bytes(*this, at, length);
    }

    Result<void> allocate(HostOffset at, std::uint64_t length) override {
        TRY_VOID(verify_writable());
        if (length == 0) return {};
        if (block_device_) return resize(at.value + length);  // its space is there
        auto reserved = reserve(at, length);
        // A full XFS refuses it also where there is nothing to do.
        if (!reserved && reserved.error().code == Errc::no_space && TRY(has_own_space(at, length))) return {};
        return reserved;
    }

    Result<void> resize(std::uint64_t size) override {
        TRY_VOID(verify_writable());
        if (block_device_) {
            const std::uint64_t there = TRY(this->size());
            if (size <= there) return {};
            return fail(Errc::no_space, path_,
                        fmt::format("the device has {} bytes, and at least {} are needed", there, size));
        }
        if (ftruncate(fd_.get(), static_cast<off_t>(size)) != 0)
            return system_error(fmt::format("cannot resize to {} bytes", size), path_, errno);
        return {};
    }

    Result<void> flush() override {
        const int error = flushes_.run([&] { return fdatasync(fd_.get()) == 0 ? 0 : errno; });
        if (error != 0) return system_error("cannot flush", path_, error);
        return {};
    }

    [[nodiscard]] Result<Run> run(HostOffset at, std::uint64_t limit) const override {
        const std::uint64_t end = TRY(size());
        if (at.value >= end) return Run{false, limit};
        const auto from = static_cast<off_t>(at.value);
        const auto clip = [&](std::uint64_t run_end) { return std::min(limit, run_end - at.value); };
        if (const std::uint64_t data_end = remembered_data(at.value); data_end != 0) return Run{true, clip(data_end)};
        const off_t data = lseek(fd_.get(), from, SEEK_DATA);
        if (data < 0 && errno == ENXIO) return Run{false, clip(end)};
        if (data < 0) return Run{true, clip(end)};  // holes cannot be told here
        if (data > from) return Run{false, clip(static_cast<std::uint64_t>(data))};
        if (limit <= device_block) return Run{true, clip(end)};  // a hole in it would be of no use
        const off_t hole = lseek(fd_.get(), from, SEEK_HOLE);
        const std::uint64_t data_end = hole <= from ? end : static_cast<std::uint64_t>(hole);
        remember_data(at.value, data_end);
        return Run{true, clip(data_end)};
    }

    Result<std::uint64_t> copy_from(const Storage& source, HostOffset from, HostOffset to,
                                    std::uint64_t length) override;

private:
    static constexpr std::size_t most_remembered = 1024;    // runs of data
    static constexpr std::uint64_t device_block = 4 * KiB;  // no device has larger ones
    static constexpr auto max_offset = static_cast<std::uint64_t>(std::numeric_limits<off_t>::max());

    // Where the next hole is may take long to find: tmpfs looks at each page. Of a file that is only read, the answers
    // are kept; that a hole has become data, or data a hole, may always be missed.

    void remember_data(std::uint64_t begin, std::uint64_t end) const {
        if (writable_) return;
        const std::lock_guard lock(data_mutex_);
        if (data_.size() >= most_remembered) data_.clear();
        data_.erase(data_.lower_bound(begin), data_.lower_bound(end));
        data_.emplace(begin, end);
    }

    /// The end of the data that `at` is known to lie in; 0: not known.
    [[nodiscard]] std::uint64_t remembered_data(std::uint64_t at) const {
        if (writable_) return 0;
        const std::lock_guard lock(data_mutex_);
        const auto behind = data_.upper_bound(at);
        if (behind == data_.begin()) return 0;
        const auto end = std::prev(behind)->second;
        return at < end ? end : 0;
    }

    [[nodiscard]] Result<struct stat> status() const {
        struct stat result = {};
        if (fstat(fd_.get(), &result) != 0) return system_error("cannot tell the size", path_, errno);
        return result;
    }

    [[nodiscard]] Result<void> verify_writable() const {
        if (!writable_) return fail(Errc::read_only, path_, "opened for reading only");
        return {};
    }

    Result<void> reserve(HostOffset at, std::uint64_t length) {
        const int error = posix_fallocate(fd_.get(), static_cast<off_t>(at.value), static_cast<off_t>(length));
        if (error != 0) return system_error(fmt::format("cannot reserve {} bytes", length), path_, error);
        return unshare(at, length);
    }

    /// Extents that the file shares with another one would need space when they are written.
    Result<void> unshare(HostOffset at, std::uint64_t length) {
        if (!may_share_.load(std::memory_order_relaxed)) return {};
        if (fallocate(fd_.get(), FALLOC_FL_UNSHARE_RANGE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(at.value),
                      static_cast<off_t>(length)) == 0)
            return {};
        if (errno == ENOSPC || errno == EDQUOT)
            return system_error(fmt::format("cannot reserve {} bytes", length), path_, errno);
        may_share_.store(false, std::memory_order_relaxed);  // this file system cannot say
        return {};
    }

    /// Whether all of it lies within the file, in extents that no other file shares. False where that cannot be told.
    [[nodiscard]] Result<bool> has_own_space(HostOffset at, std::uint64_t length) const {
        constexpr std::uint32_t most = 32;  // extents that are asked for at once
        const std::uint64_t end = at.value + length;
        if (end > TRY(size())) return false;
        alignas(fiemap) std::array<std::byte, sizeof(fiemap) + most * sizeof(fiemap_extent)> memory;
        for (std::uint64_t known = at.value; known < end;) {
            memory.fill(std::byte{0});
            auto* const map = reinterpret_cast<fiemap*>(memory.data());
            map->fm_start = known;
            map->fm_length = end - known;
            map->fm_extent_count = most;
            if (ioctl(fd_.get(), FS_IOC_FIEMAP, map) != 0 || map->fm_mapped_extents == 0) return false;
            for (const auto& extent : std::span(map->fm_extents, map->fm_mapped_extents)) {
                const std::uint64_t extent_end = extent.fe_logical + extent.fe_length;
                const bool goes_on = extent.fe_logical <= known && known < extent_end;
                if (!goes_on || (extent.fe_flags & FIEMAP_EXTENT_SHARED) != 0) return false;
                known = extent_end;
            }
        }
        return true;
    }

    FileDescriptor fd_;
    std::string path_;
    std::string identity_;
    bool block_device_;
    bool writable_;
    std::uint64_t block_;  // that direct I/O goes by; else 1
    std::atomic<bool> may_share_ = true;
    OverlappingFlushes flushes_;
    mutable std::mutex data_mutex_;
    mutable std::map<std::uint64_t, std::uint64_t> data_;  // what is remembered: ends by beginnings
};

Result<std::uint64_t> FileStorage::copy_from(const Storage& source, HostOffset from, HostOffset to,
                                             std::uint64_t length) {
    const auto* file = dynamic_cast<const FileStorage*>(&source);
    if (file == nullptr) return 0;
    TRY_VOID(verify_writable());
    const file_clone_range range{file->fd_.get(), from.value, length, to.value};
    if (ioctl(fd_.get(), FICLONERANGE, &range) == 0) return length;
    // Where both files lie on a server, it copies without sending anything. On a local file system that cannot share,
    // copy_file_range passes everything through a pipe, more slowly than read and write do.
    if (!on_server(fd_.get()) || !on_server(file->fd_.get())) return 0;
    std::uint64_t done = 0;
    while (done < length) {
        auto in = static_cast<loff_t>(from.value + done);
        auto out = static_cast<loff_t>(to.value + done);
        const ssize_t n = copy_file_range(file->fd_.get(), &in, fd_.get(), &out, length - done, 0);
        if (n <= 0) break;  // whatever the reason: reading and writing will meet it again and name it
        done += static_cast<std::uint64_t>(n);
    }
    return done;
}

/// What the system says that direct I/O on the file must go by; what suffices anywhere, where it does not say. Returns
/// nothing if there is no direct I/O.
std::optional<DirectAlignment> direct_alignment(int fd) {
    struct statx status = {};
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) != 0 || (status.stx_mask & STATX_DIOALIGN) == 0)
        return DirectAlignment{};
    if (status.stx_dio_offset_align == 0) return std::nullopt;
    return DirectAlignment{status.stx_dio_offset_align, status.stx_dio_mem_align};
}

std::unexpected<Error> no_direct(const std::string& path) {
    return fail(Errc::unsupported, path,
                "its file system has no direct I/O (O_DIRECT); it can only be used through the system's cache");
}

Result<void> verify_kind(const struct stat& status, const std::string& path) {
    if (S_ISDIR(status.st_mode)) return fail(Errc::invalid_argument, path, "is a directory, not an image");
    if (S_ISFIFO(status.st_mode) || S_ISSOCK(status.st_mode)) {
        return fail(Errc::invalid_argument, path,
                    "is a pipe or a socket, and images are read and written in any order; write the bytes into a "
                    "file, and use that");
    }
    if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode)) {
        return fail(Errc::invalid_argument, path, "is neither a regular file nor a block device");
    }
    return {};
}

}  // namespace

std::unexpected<Error> system_error(std::string_view action, const std::string& path, int error) {
    const auto code = [&] {
        switch (error) {
            case ENOENT:
            case ENOTDIR: return Errc::not_found;
            case EACCES:
            case EPERM:
            case EROFS: return Errc::access_denied;
            case ENOSPC:
            case EDQUOT:
            case EFBIG: return Errc::no_space;
            case EISDIR: return Errc::invalid_argument;
            case EMFILE:
            case ENFILE: return Errc::limit_exceeded;
            default: return Errc::io;
        }
    }();
    if (error == EMFILE) {
        return fail(code, path,
                    fmt::format("{}: the process may not have more files open; an image needs one for each file of its "
                                "backing chain (see ulimit -n)",
                                action));
    }
    return fail(code, path, fmt::format("{}: {}", action, std::strerror(error)));
}

std::string identity_of(const struct stat& status) {
    return S_ISBLK(status.st_mode) ? fmt::format("device:{}", status.st_rdev)
                                   : fmt::format("file:{}:{}", status.st_dev, status.st_ino);
}

std::filesystem::path link_target(std::filesystem::path path) {
    constexpr int max_links = 40;  // as the kernel's
    std::error_code error;
    for (int i = 0; i < max_links && std::filesystem::is_symlink(path, error); ++i) {
        path = path.parent_path() / std::filesystem::read_symlink(path, error);
    }
    return path;
}

Result<std::shared_ptr<Storage>> file_storage(FileDescriptor fd, const std::string& path, const FileOptions& options) {
    struct stat status = {};
    if (fstat(fd.get(), &status) != 0) return system_error("cannot open", path, errno);
    TRY_VOID(verify_kind(status, path));
    if (!options.force_share) TRY_VOID(lock_file(fd.get(), path, options.writable));
    const auto storage = [&](std::uint64_t block) {
        return std::make_shared<FileStorage>(std::move(fd), path, status, options.writable, block);
    };
    if (!options.direct) return storage(1);
    const auto alignment = direct_alignment(fd.get());
    if (!alignment) return no_direct(path);
    return direct_storage(storage(alignment->block), *alignment);
}

Result<void> write_zero_bytes(Storage& storage, HostOffset at, std::uint64_t length) {
    alignas(4096) static constexpr std::array<std::byte, 64 * KiB> zeros = {};
    while (length > 0) {
        const auto piece = std::min<std::uint64_t>(length, zeros.size());
        TRY_VOID(storage.write(at, std::span(zeros).first(piece)));
        at += piece;
        length -= piece;
    }
    return {};
}

int open_flags(const FileOptions& options) {
    return (options.writable ? O_RDWR : O_RDONLY) | (options.direct ? O_DIRECT : 0) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
}

std::unexpected<Error> open_error(const std::string& path, int error, int flags) {
    if (error == EINVAL && (flags & O_DIRECT) != 0) return no_direct(path);
    if (error == EBUSY && (flags & O_EXCL) != 0) {
        return fail(
            Errc::locked, path,
            "the device is in use: it or a partition of it is mounted, is swap space, or belongs to a volume or "
            "to another program; unmount or stop what uses it");
    }
    return system_error((flags & O_ACCMODE) == O_RDWR ? "cannot open for writing" : "cannot open", path, error);
}

namespace {

Result<std::shared_ptr<Storage>> open_verified(const std::string& path, const FileOptions& options) {
    if (options.force_share && options.writable) {
        return fail(Errc::invalid_argument, path,
                    "what is written to cannot be shared by force; open it for reading only, or with locks");
    }
    // To open a device may have effects already: tapes are rewound, watchdogs begin to bark. So it is looked at before;
    // and again when it is open, as it may have changed.
    struct stat there = {};
    if (stat(path.c_str(), &there) == 0) TRY_VOID(verify_kind(there, path));
    // A device that is mounted, or part of a volume, is not written: EBUSY.
    const bool exclusive = options.writable && S_ISBLK(there.st_mode);
    const int flags = open_flags(options) | (exclusive ? O_EXCL : 0);
    FileDescriptor fd(open(path.c_str(), flags));
    if (fd.get() < 0) return open_error(path, errno, flags);
    return file_storage(std::move(fd), path, options);
}

}  // namespace

Result<std::shared_ptr<Storage>> open_file(const std::string& path, const FileOptions& options) {
    return within_memory([&] { return open_verified(path, options); });
}

}  // namespace qcow
