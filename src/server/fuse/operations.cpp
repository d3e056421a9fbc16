#include "server/fuse/operations.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <vector>

#include "base/within_memory.h"

namespace qcow::fuse {

thread_local std::span<std::byte> read_memory;

namespace {

/// How long the kernel may keep names and attributes: as long as it likes, since no one else changes them.
constexpr double forever = 1e9;

/// Requests that the kernel sends without a program that waits for them: direct I/O of many requests, and readahead.
constexpr unsigned max_background = 256;

int errno_of(Errc code) {
    switch (code) {
        case Errc::invalid_argument: return EINVAL;
        case Errc::not_found: return ENOENT;
        case Errc::access_denied:
        case Errc::refused_by_policy:
        case Errc::encrypted: return EACCES;
        case Errc::locked: return EBUSY;
        case Errc::read_only: return EROFS;
        case Errc::no_space: return ENOSPC;
        case Errc::unsupported: return EOPNOTSUPP;
        case Errc::no_memory: return ENOMEM;
        case Errc::cancelled: return EINTR;
        case Errc::io:
        case Errc::corrupt:
        case Errc::limit_exceeded: break;
    }
    return EIO;
}

Files& files_of(fuse_req_t request) { return *static_cast<Files*>(fuse_req_userdata(request)); }

void reply_error(fuse_req_t request, const Error& error) {
    auto& files = files_of(request);
    if (files.failed) {
        const std::lock_guard lock(files.failures);
        if (!files.told.contains(error.code)) {
            files.failed(error);
            // If there is no memory to note that it was told, it is told again.
            static_cast<void>(within_memory([&]() -> Result<void> {
                files.told.insert(error.code);
                return {};
            }));
        }
    }
    fuse_reply_err(request, errno_of(error.code));
}

void reply(fuse_req_t request, const Result<void>& result) {
    if (!result) return reply_error(request, result.error());
    fuse_reply_err(request, 0);
}

/// Returns the disk of a file. If there is none, the request is answered, and the result is null.
Disk* disk_of(fuse_req_t request, fuse_ino_t number) {
    auto* const node = files_of(request).tree.find(number);
    if (node == nullptr || node->is_directory()) {
        fuse_reply_err(request, node == nullptr ? ENOENT : EISDIR);
        return nullptr;
    }
    auto disk = within_memory([&] { return node->disk(); });
    if (disk) return *disk;
    reply_error(request, disk.error());
    return nullptr;
}

/// As disk_of, for a change.
Disk* writable_disk_of(fuse_req_t request, fuse_ino_t number) {
    const auto* const node = files_of(request).tree.find(number);
    if (node != nullptr && !node->is_directory() && !node->writable()) {
        fuse_reply_err(request, EROFS);
        return nullptr;
    }
    return disk_of(request, number);
}

/// Whether the range has a meaning at all. The end of a file that can be is a positive off_t.
bool is_range(off_t at, std::uint64_t length) {
    return at >= 0 && length <= static_cast<std::uint64_t>(std::numeric_limits<off_t>::max() - at);
}

/// Fills the attributes of a node. On an error the request is answered, and the result is false.
bool attributes_of(fuse_req_t request, fuse_ino_t number, struct stat& attributes) {
    auto& files = files_of(request);
    auto* const node = files.tree.find(number);
    if (node == nullptr) {
        fuse_reply_err(request, ENOENT);
        return false;
    }
    constexpr mode_t may_read = S_IRUSR | S_IRGRP | S_IROTH;
    constexpr mode_t may_write = S_IWUSR | S_IWGRP | S_IWOTH;
    const auto permissions = files.mount_point.st_mode;
    attributes.st_ino = number;
    attributes.st_uid = files.mount_point.st_uid;
    attributes.st_gid = files.mount_point.st_gid;
    attributes.st_mtim = node->modified();
    attributes.st_ctim = attributes.st_mtim;
    attributes.st_atim = attributes.st_mtim;
    attributes.st_blksize = static_cast<blksize_t>(max_transfer);
    if (node->is_directory()) {
        attributes.st_mode = S_IFDIR | (permissions & 0555);
        attributes.st_nlink = 2;
        return true;
    }
    auto* const disk = disk_of(request, number);
    if (disk == nullptr) return false;
    attributes.st_mode = S_IFREG | (permissions & (node->writable() ? may_read | may_write : may_read));
    attributes.st_nlink = 1;
    attributes.st_size = static_cast<off_t>(disk->size());
    // What is stored is not known without a walk over the disk. One sector less than all of it makes programs look for
    // holes before they copy.
    attributes.st_blocks = static_cast<blkcnt_t>(std::max<std::uint64_t>(divide_up(disk->size(), 512), 2) - 1);
    return true;
}

void init(void* data, fuse_conn_info* connection) {
    static_cast<void>(data);
    connection->max_read = max_transfer;  // as in the options of the mount
    connection->max_write = max_transfer;
    connection->max_readahead = max_transfer;
    connection->max_background = max_background;
    connection->congestion_threshold = max_background;
    // O_TRUNC is refused as every other change of the size is. Without others who change the disk, a new time of
    // modification is no reason to drop cached pages.
    connection->want &= ~static_cast<unsigned>(FUSE_CAP_ATOMIC_O_TRUNC | FUSE_CAP_AUTO_INVAL_DATA |
                                               FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE);
    connection->want |= connection->capable & (FUSE_CAP_ASYNC_DIO | FUSE_CAP_ASYNC_READ | FUSE_CAP_PARALLEL_DIROPS |
                                               FUSE_CAP_NO_OPENDIR_SUPPORT | FUSE_CAP_EXPLICIT_INVAL_DATA);
}

void lookup(fuse_req_t request, fuse_ino_t parent, const char* name) {
    auto* const directory = files_of(request).tree.find(parent);
    fuse_entry_param entry = {};
    entry.attr_timeout = forever;
    entry.entry_timeout = forever;
    const auto found = within_memory([&]() -> Result<void> {
        if (directory == nullptr) return {};
        if (const auto it = directory->entries.find(name); it != directory->entries.end()) entry.ino = it->second;
        return {};
    });
    if (!found) return reply_error(request, found.error());
    if (entry.ino == 0) {
        fuse_reply_err(request, ENOENT);
        return;
    }
    if (attributes_of(request, entry.ino, entry.attr)) fuse_reply_entry(request, &entry);
}

void getattr(fuse_req_t request, fuse_ino_t number, fuse_file_info*) {
    struct stat attributes = {};
    if (attributes_of(request, number, attributes)) fuse_reply_attr(request, &attributes, forever);
}

void setattr(fuse_req_t request, fuse_ino_t number, struct stat* wanted, int which, fuse_file_info*) {
    if ((which & (FUSE_SET_ATTR_MODE | FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID)) != 0) {
        fuse_reply_err(request, EPERM);
        return;
    }
    if ((which & FUSE_SET_ATTR_SIZE) != 0) {
        const auto* const disk = writable_disk_of(request, number);
        if (disk == nullptr) return;
        if (wanted->st_size < 0 || static_cast<std::uint64_t>(wanted->st_size) != disk->size()) {
            return reply_error(request,
                               Error{Errc::unsupported, "mounted file",
                                     "the size of a disk is fixed while it is mounted; unmount it, and use "
                                     "qcow resize. To write from the start, do not truncate (dd: conv=notrunc)"});
        }
    }
    struct stat attributes = {};
    if (attributes_of(request, number, attributes)) fuse_reply_attr(request, &attributes, forever);
}

void readdir(fuse_req_t request, fuse_ino_t number, std::size_t size, off_t from, fuse_file_info*) {
    const auto& tree = files_of(request).tree;
    const auto* const directory = tree.find(number);
    if (directory == nullptr || !directory->is_directory()) {
        fuse_reply_err(request, ENOTDIR);
        return;
    }
    const auto room = read_memory.first(std::min(size, read_memory.size()));
    std::size_t used = 0;
    off_t place = 0;  // of the next entry
    const auto add = [&](const char* name, std::uint64_t entry, mode_t type) {
        if (place++ < from) return true;
        struct stat attributes = {};
        attributes.st_ino = entry;
        attributes.st_mode = type;
        const auto rest = room.subspan(used);
        const auto needed =
            fuse_add_direntry(request, reinterpret_cast<char*>(rest.data()), rest.size(), name, &attributes, place);
        if (needed > rest.size()) return false;
        used += needed;
        return true;
    };
    bool fits = add(".", number, S_IFDIR) && add("..", directory->parent(), S_IFDIR);
    for (auto entry = directory->entries.begin(); fits && entry != directory->entries.end(); ++entry) {
        const bool is_directory = tree.find(entry->second)->is_directory();
        fits = add(entry->first.c_str(), entry->second, is_directory ? S_IFDIR : S_IFREG);
    }
    fuse_reply_buf(request, reinterpret_cast<const char*>(room.data()), used);
}

void open(fuse_req_t request, fuse_ino_t number, fuse_file_info* file) {
    const bool changes = (file->flags & O_ACCMODE) != O_RDONLY;
    const auto* const disk = changes ? writable_disk_of(request, number) : disk_of(request, number);
    if (disk == nullptr) return;
    const bool cached = files_of(request).tree.find(number)->cached();
    file->direct_io = cached ? 0 : 1;
    file->keep_cache = cached ? 1 : 0;  // nobody else changes the disk
    fuse_reply_open(request, file);
}

void read(fuse_req_t request, fuse_ino_t number, std::size_t size, off_t at, fuse_file_info*) {
    auto* const disk = disk_of(request, number);
    if (disk == nullptr) return;
    if (!is_range(at, size)) {
        fuse_reply_err(request, EINVAL);
        return;
    }
    const auto begin = static_cast<std::uint64_t>(at);
    const auto rest = disk->size() - std::min(disk->size(), begin);
    const auto to = read_memory.first(std::min({size, read_memory.size(), static_cast<std::size_t>(rest)}));
    if (!to.empty()) {
        const auto done = files_of(request).pace.timed(to.size(), [&] { return disk->read({begin}, to); });
        if (!done) return reply_error(request, done.error());
    }
    fuse_reply_buf(request, reinterpret_cast<const char*>(to.data()), to.size());
}

void write_buf(fuse_req_t request, fuse_ino_t number, fuse_bufvec* from, off_t at, fuse_file_info*) {
    auto* const disk = writable_disk_of(request, number);
    if (disk == nullptr) return;
    const auto& buffer = from->buf[from->idx];
    const bool in_memory = from->count == from->idx + 1 && (buffer.flags & FUSE_BUF_IS_FD) == 0;
    if (!in_memory || !is_range(at, buffer.size) || from->off > buffer.size) {
        fuse_reply_err(request, EINVAL);
        return;
    }
    const auto begin = static_cast<std::uint64_t>(at);
    auto bytes = std::span(static_cast<const std::byte*>(buffer.mem), buffer.size).subspan(from->off);
    const auto rest = disk->size() - std::min(disk->size(), begin);
    if (bytes.size() > rest) bytes = bytes.first(static_cast<std::size_t>(rest));
    if (bytes.empty()) {
        fuse_reply_err(request, buffer.size == 0 ? 0 : ENOSPC);
        return;
    }
    const auto done = files_of(request).pace.timed(bytes.size(), [&] { return disk->write({begin}, bytes); });
    if (!done) return reply_error(request, done.error());
    files_of(request).tree.find(number)->touch();
    fuse_reply_write(request, bytes.size());
}

void fsync(fuse_req_t request, fuse_ino_t number, int, fuse_file_info*) {
    const auto* const node = files_of(request).tree.find(number);
    if (node != nullptr && !node->writable()) {
        fuse_reply_err(request, 0);
        return;
    }
    if (auto* const disk = disk_of(request, number)) reply(request, disk->flush());
}

void fallocate(fuse_req_t request, fuse_ino_t number, int mode, off_t at, off_t length, fuse_file_info*) {
    auto* const disk = writable_disk_of(request, number);
    if (disk == nullptr) return;
    if (length <= 0 || !is_range(at, static_cast<std::uint64_t>(length))) {
        fuse_reply_err(request, EINVAL);
        return;
    }
    const bool punches = mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
    const bool zeroes = (mode & ~FALLOC_FL_KEEP_SIZE) == FALLOC_FL_ZERO_RANGE;
    const auto begin = static_cast<std::uint64_t>(at);
    const auto bytes = static_cast<std::uint64_t>(length);
    const bool grows = (mode & FALLOC_FL_KEEP_SIZE) == 0 && !lies_within(begin, bytes, disk->size());
    if ((!punches && !zeroes) || grows) {
        fuse_reply_err(request, EOPNOTSUPP);
        return;
    }
    const auto rest = disk->size() - std::min(disk->size(), begin);
    if (rest == 0) {
        fuse_reply_err(request, 0);
        return;
    }
    files_of(request).tree.find(number)->touch();
    const auto how = punches ? Disk::Zeroes::release : Disk::Zeroes::keep;
    reply(request, disk->write_zeroes({begin}, std::min(bytes, rest), how));
}

void lseek(fuse_req_t request, fuse_ino_t number, off_t from, int whence, fuse_file_info*) {
    auto* const disk = disk_of(request, number);
    if (disk == nullptr) return;
    if (whence != SEEK_DATA && whence != SEEK_HOLE) {
        fuse_reply_err(request, EINVAL);
        return;
    }
    if (from < 0 || static_cast<std::uint64_t>(from) >= disk->size()) {
        fuse_reply_err(request, ENXIO);
        return;
    }
    for (auto at = static_cast<std::uint64_t>(from); at < disk->size();) {
        const auto extent = disk->extent({at}, disk->size() - at);
        if (!extent) return reply_error(request, extent.error());
        if ((extent->kind == Extent::Kind::data) == (whence == SEEK_DATA)) {
            fuse_reply_lseek(request, static_cast<off_t>(at));
            return;
        }
        at += extent->length;
        // A disk may have very many extents.
        if (fuse_req_interrupted(request) != 0) {
            fuse_reply_err(request, EINTR);
            return;
        }
    }
    // The end of the file is a hole.
    if (whence == SEEK_HOLE) {
        fuse_reply_lseek(request, static_cast<off_t>(disk->size()));
    } else {
        fuse_reply_err(request, ENXIO);
    }
}

void statfs(fuse_req_t request, fuse_ino_t) {
    auto* const root = files_of(request).tree.find(FUSE_ROOT_ID);
    auto* const shown = root->is_directory() ? files_of(request).tree.find(root->entries.at("disk")) : root;
    const auto disk = shown->disk();
    struct statvfs numbers = {};
    numbers.f_bsize = 4096;
    numbers.f_frsize = 4096;
    numbers.f_blocks = divide_up(disk ? (*disk)->size() : 0, 4096);
    numbers.f_namemax = 255;
    fuse_reply_statfs(request, &numbers);
}

}  // namespace

const fuse_lowlevel_ops& operations() {
    static const fuse_lowlevel_ops table = [] {
        fuse_lowlevel_ops made = {};
        made.init = init;
        made.lookup = lookup;
        made.getattr = getattr;
        made.setattr = setattr;
        made.readdir = readdir;
        made.open = open;
        made.read = read;
        made.write_buf = write_buf;
        made.fsync = fsync;
        made.fallocate = fallocate;
        made.lseek = lseek;
        made.statfs = statfs;
        return made;
    }();
    return table;
}

}  // namespace qcow::fuse
