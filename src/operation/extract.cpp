// Files of a disk become files of this machine.

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <map>
#include <mutex>
#include <variant>

#include "base/bits.h"
#include "base/within_memory.h"
#include "base/workers.h"
#include "operation/extract_item.h"
#include "operation/in_order.h"
#include "qcow/filesystem.h"
#include "qcow/text.h"
#include "storage/file.h"
#include "storage/unfinished.h"

namespace qcow {
namespace {

constexpr std::uint64_t content_piece = 1 * MiB;
/// Shorter files are copied by one thread: starting others takes longer.
constexpr std::uint64_t shared_bytes = 8 * MiB;

Result<void> read_stored(Disk& disk, const FileExtent& extent, std::span<std::byte> to) {
    if (!lies_within(extent.stored->value, to.size(), disk.size()))
        return fail(Errc::corrupt, "", "the contents lie past the end of the disk");
    return disk.read(*extent.stored, to);
}

/// Calls `take` for extents of the file, in order and without gaps, each of at most `content_piece` bytes of data.
template <class Take>
Result<void> each_piece(FileSystem& files, Inode inode, Take&& take) {
    std::uint64_t at = 0;
    while (true) {
        const auto extents = TRY(files.extents(inode, at));
        if (extents.size() > FileSystem::most_extents) return fail(Errc::corrupt, "", "too many extents");
        for (const auto& extent : extents) {
            if (extent.at != at || extent.length == 0 || extent.length > bit(63) - at)
                return fail(Errc::corrupt, "", "the extents of a file have gaps");
            at += extent.length;
            if (!extent.stored) {
                TRY_VOID(take(extent));
                continue;
            }
            for (std::uint64_t done = 0; done < extent.length; done += content_piece) {
                TRY_VOID(take(FileExtent{extent.at + done, std::min(content_piece, extent.length - done),
                                         *extent.stored + done}));
            }
        }
        if (extents.empty()) return {};
    }
}

/// Whether the contents can be read from the disk. Other errors than Errc::unsupported show up again.
bool lies_in_disk(FileSystem& files, Inode inode, Disk* disk) {
    return disk != nullptr && files.extents(inode).has_value();
}

// ---- In order ----

/// Reads the pieces of a file ahead, on several threads.
struct ContentsJob {
    using Memory = std::monostate;
    std::vector<FileExtent> pieces;
    Disk& disk;
    const std::function<Result<void>(std::span<const std::byte>)>& take;
    std::size_t taken = 0;

    Result<std::optional<FileExtent>> next() {
        if (taken == pieces.size()) return std::nullopt;
        return pieces[taken++];
    }
    Result<std::vector<std::byte>> perform(const FileExtent& piece, Memory&) const {
        std::vector<std::byte> bytes(piece.length);
        if (piece.stored) TRY_VOID(read_stored(disk, piece, bytes));
        return bytes;
    }
    Result<bool> settle(Result<std::vector<std::byte>> bytes) const {
        TRY_VOID(take(TRY(std::move(bytes))));
        return true;
    }
};

Result<void> read_in_order(FileSystem& files, Inode inode, Disk* disk, unsigned workers,
                           const std::function<Result<void>(std::span<const std::byte>)>& take) {
    if (lies_in_disk(files, inode, disk)) {
        // As many pieces at a time as take little memory.
        constexpr std::size_t batch = 64;
        std::vector<FileExtent> pieces;
        const auto flush = [&]() -> Result<void> {
            ContentsJob job{std::move(pieces), *disk, take};
            pieces.clear();
            const auto threads = std::min<std::size_t>(workers == 0 ? default_workers() : workers, job.pieces.size());
            return threads == 0 ? Result<void>() : run_in_order(static_cast<unsigned>(threads), job);
        };
        TRY_VOID(each_piece(
            files, inode,
            [&](const FileExtent& extent) -> Result<void> {
                // A long hole is not read.
                if (!extent.stored && extent.length > content_piece) {
                    TRY_VOID(flush());
                    const std::vector<std::byte> zeros(content_piece);
                    for (auto left = extent.length; left > 0; left -= std::min(left, content_piece))
                        TRY_VOID(take(std::span(zeros).first(std::min(left, content_piece))));
                    return {};
                }
                for (std::uint64_t done = 0; done < extent.length; done += content_piece) {
                    pieces.push_back({extent.at + done, std::min(content_piece, extent.length - done), extent.stored});
                    if (pieces.size() == batch) TRY_VOID(flush());
                }
                return {};
            }));
        return flush();
    }
    std::vector<std::byte> buffer(content_piece);
    for (std::uint64_t at = 0;;) {
        const auto done = TRY(files.read(inode, at, buffer));
        if (done == 0) return {};
        TRY_VOID(take(std::span(buffer).first(std::min(done, buffer.size()))));
        at += done;
    }
}

// ---- Files ----

class Extraction {
public:
    Extraction(FileSystem& files, const ExtractOptions& options) : files_(files), options_(options) {}

    Result<ExtractReport> run(const std::vector<ExtractItem>& items, const std::string& target) {
        const int top = open(target.empty() ? "." : target.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (top < 0) return system_error("cannot open", target, errno);
        above_.push_back({FileDescriptor(top), {}, {}});
        for (const auto& item : items) TRY_VOID(add(item));
        return std::move(report_);
    }

private:
    Result<void> add(const ExtractItem& item) {
        item_ = &item;
        WalkOptions options;
        if (options_.failed) options.failed = [&](const std::string& path, const Error& error) { note(path, error); };
        auto walked = walk(files_, item.inode, options, [&](const Visited& visited) { return visit(visited); });
        auto left = leave(1);
        return walked ? left : walked;
    }

    /// `path` is relative to the item.
    void note(const std::string& path, const Error& error) {
        ++report_.failed;
        options_.failed(shown_path(*item_, path), error);
    }

    /// A directory that is being filled. Its own properties are set when all is in it.
    struct Above {
        FileDescriptor fd;
        std::string path;
        std::optional<FileInfo> info;  // none: the target, which is not ours
    };

    Result<Descend> visit(const Visited& visited) {
        // A name may be empty only for the root that goes into the target itself.
        const bool itself = visited.depth == 0 && item_->name.empty();
        TRY_VOID(leave(visited.depth + 1));
        auto made =
            itself ? enter_target(visited) : make(visited, visited.depth == 0 ? item_->name : visited.entry.name);
        if (made) return visited.info.type == FileType::directory ? Descend::yes : Descend::no;
        if (!options_.failed)
            return std::unexpected(std::move(made).error().in(printable(shown_path(*item_, visited.path), 256)));
        note(visited.path, made.error());
        return Descend::no;
    }

    Result<void> enter_target(const Visited& visited) {
        if (visited.info.type != FileType::directory)
            return fail(Errc::invalid_argument, "", "only a directory can become the target itself");
        const int copy = fcntl(above_.back().fd.get(), F_DUPFD_CLOEXEC, 0);
        if (copy < 0) return system_error("cannot open", visited.path, errno);
        above_.push_back({FileDescriptor(copy), visited.path, visited.info});
        return {};
    }

    /// Ends directories until `count` are open.
    Result<void> leave(std::size_t count) {
        while (above_.size() > count) {
            auto above = std::move(above_.back());
            above_.pop_back();
            if (above.info) {
                auto set = set_properties(above.fd.get(), *above.info);
                if (!set && !options_.failed) return set;
                if (!set) note(above.path, set.error());
            }
        }
        return {};
    }

    Result<void> make(const Visited& visited, const std::string& name) {
        if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos ||
            name.find('\0') != std::string::npos)
            return fail(Errc::refused_by_policy, "", "the name would lead out of the target");
        const auto& info = visited.info;
        const int parent = above_.back().fd.get();
        if (info.type != FileType::directory && info.links > 1) {
            const auto [first, fresh] = made_.try_emplace(info.inode, relative(visited, name));
            if (!fresh) {
                if (linkat(above_.front().fd.get(), first->second.c_str(), parent, name.c_str(), 0) != 0)
                    return system_error("cannot link", name, errno);
                ++report_.files;
                return {};
            }
        }
        auto done = make_new(visited, parent, name);
        if (!done) made_.erase(info.inode);
        if (done) ++report_.files;
        return done;
    }

    [[nodiscard]] std::string relative(const Visited& visited, const std::string& name) const {
        if (visited.depth == 0) return name;
        return item_->name.empty() ? visited.path : item_->name + "/" + visited.path;
    }

    Result<void> make_new(const Visited& visited, int parent, const std::string& name) {
        const auto& info = visited.info;
        switch (info.type) {
            case FileType::regular: return make_regular(info, parent, name);
            case FileType::directory: return make_directory(visited, parent, name);
            case FileType::symbolic_link: {
                const auto target = TRY(files_.read_link(info.inode));
                if (target.empty() || target.find('\0') != std::string::npos)
                    return fail(Errc::corrupt, "", "the target of the link is no path");
                if (symlinkat(target.c_str(), parent, name.c_str()) != 0) return create_error(name);
                return set_node_properties(info, parent, name);
            }
            case FileType::character_device:
            case FileType::block_device:
            case FileType::fifo:
            case FileType::socket: return make_node(info, parent, name);
            case FileType::unknown: break;
        }
        return fail(Errc::unsupported, "", "this is no kind of file that can be extracted");
    }

    static std::unexpected<Error> create_error(const std::string& name) {
        if (errno == EEXIST)
            return fail(Errc::invalid_argument, "", "something with this name exists; it is not replaced");
        return system_error("cannot create", name, errno);
    }

    Result<void> make_directory(const Visited& visited, int parent, const std::string& name) {
        if (mkdirat(parent, name.c_str(), 0700) != 0 && errno != EEXIST) return create_error(name);
        // A link with this name is not followed.
        const int fd = openat(parent, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (fd < 0 && (errno == ENOTDIR || errno == ELOOP))
            return fail(Errc::invalid_argument, "", "something with this name exists that is no directory");
        if (fd < 0) return system_error("cannot open", name, errno);
        above_.push_back({FileDescriptor(fd), visited.path, visited.info});
        return {};
    }

    Result<void> make_node(const FileInfo& info, int parent, const std::string& name) {
        constexpr std::array<mode_t, 8> types = {0, 0, 0, 0, S_IFCHR, S_IFBLK, S_IFIFO, S_IFSOCK};
        const auto mode = types.at(static_cast<std::size_t>(info.type)) | 0600U;
        if (mknodat(parent, name.c_str(), mode, makedev(info.major, info.minor)) != 0) {
            if (errno != EPERM) return create_error(name);
            not_kept("device nodes");
            return fail(Errc::access_denied, "", "only root can make device nodes");
        }
        return set_node_properties(info, parent, name);
    }

    Result<void> make_regular(const FileInfo& info, int parent, const std::string& name) {
        if (faccessat(parent, name.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) == 0) {
            errno = EEXIST;
            return create_error(name);
        }
        // A file gets its name when it is complete.
        const FileDescriptor unnamed(openat(parent, ".", O_TMPFILE | O_WRONLY | O_CLOEXEC, 0600));
        if (unnamed.get() < 0) return make_regular_by_name(info, parent, name);
        TRY_VOID(fill(info, unnamed.get(), name));
        const auto path = fmt::format("/proc/self/fd/{}", unnamed.get());
        if (linkat(AT_FDCWD, path.c_str(), parent, name.c_str(), AT_SYMLINK_FOLLOW) == 0) return {};
        return errno == ENOENT ? make_regular_by_name(info, parent, name) : create_error(name);
    }

    /// Where files without names cannot be made. A signal that ends the process removes the file.
    Result<void> make_regular_by_name(const FileInfo& info, int parent, const std::string& name) {
        const FileDescriptor file(
            openat(parent, name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
        if (file.get() < 0) return create_error(name);
        const Unfinished listed(fmt::format("/proc/self/fd/{}/{}", parent, name));
        auto done = fill(info, file.get(), name);
        if (!done) unlinkat(parent, name.c_str(), 0);
        return done;
    }

    Result<void> fill(const FileInfo& info, int file, const std::string& name) {
        TRY_VOID(copy_contents(info, file, name));
        return set_properties(file, info);
    }

    // ---- Contents ----

    Result<void> copy_contents(const FileInfo& info, int file, const std::string& name) {
        if (info.size == 0) return {};
        if (info.size > bit(63) - 1 || ftruncate(file, static_cast<off_t>(info.size)) != 0) {
            return system_error("cannot make as long as the file in the disk", name,
                                info.size > bit(63) - 1 ? EFBIG : errno);
        }
        if (lies_in_disk(files_, info.inode, options_.disk)) return copy_pieces(info, file, name);
        std::vector<std::byte> buffer(std::min(content_piece, info.size));
        for (std::uint64_t at = 0; at < info.size;) {
            const auto got = TRY(files_.read(info.inode, at, buffer));
            if (got == 0)
                return fail(Errc::corrupt, "", fmt::format("the contents end after {} of {} bytes", at, info.size));
            const auto part = std::span(buffer).first(std::min<std::uint64_t>({got, buffer.size(), info.size - at}));
            TRY_VOID(write_piece(file, at, part, name));
            at += part.size();
        }
        return {};
    }

    Result<void> copy_pieces(const FileInfo& info, int file, const std::string& name) {
        std::vector<FileExtent> pieces;
        const auto flush = [&]() -> Result<void> {
            std::atomic<std::size_t> next = 0;
            std::atomic<bool> failed = false;
            const auto all = options_.workers == 0 ? default_workers() : options_.workers;
            const auto threads = info.size < shared_bytes ? 1 : std::min<std::size_t>(all, pieces.size());
            if (pieces.empty()) return {};
            auto done = run_workers(static_cast<unsigned>(threads), [&](unsigned) {
                return within_memory([&]() -> Result<void> {
                    std::vector<std::byte> buffer;
                    for (auto i = next++; i < pieces.size() && !failed; i = next++) {
                        const auto& piece = pieces[i];
                        buffer.resize(std::max<std::size_t>(buffer.size(), piece.length));
                        const auto part = std::span(buffer).first(piece.length);
                        auto copied = read_stored(*options_.disk, piece, part);
                        if (copied) copied = write_piece(file, piece.at, part, name);
                        if (copied) continue;
                        failed = true;
                        return copied;
                    }
                    return {};
                });
            });
            pieces.clear();
            return done;
        };
        constexpr std::size_t batch = 4096;
        TRY_VOID(each_piece(
            files_, info.inode,
            [&](const FileExtent& extent) -> Result<void> {
                if (!lies_within(extent.at, extent.length, info.size))
                    return fail(Errc::corrupt, "", "the file has more contents than its size says");
                if (!extent.stored) return {};  // a hole already
                pieces.push_back(extent);
                return pieces.size() == batch ? flush() : Result<void>();
            }));
        return flush();
    }

    /// Zeros stay a hole.
    Result<void> write_piece(int file, std::uint64_t at, std::span<const std::byte> bytes, const std::string& name) {
        if (!is_zero(bytes)) {
            for (std::size_t done = 0; done < bytes.size();) {
                const auto written =
                    pwrite(file, bytes.data() + done, bytes.size() - done, static_cast<off_t>(at + done));
                if (written < 0 && errno == EINTR) continue;
                if (written < 0) return system_error("cannot write", name, errno);
                done += static_cast<std::size_t>(written);
            }
        }
        const std::lock_guard lock(mutex_);
        report_.bytes += bytes.size();
        if (options_.progress) options_.progress(report_.bytes);
        return {};
    }

    // ---- Properties ----

    void not_kept(const std::string& what) {
        if (std::ranges::find(report_.not_kept, what) == report_.not_kept.end()) report_.not_kept.push_back(what);
    }

    /// The owner decides what set-user-ID means, so without him these bits are left out.
    [[nodiscard]] mode_t kept_mode(const FileInfo& info, bool owned) const {
        return info.mode & (owned ? 07777U : 01777U);
    }

    static std::array<timespec, 2> times_of(const FileInfo& info) {
        const auto time = [](const std::optional<Timestamp>& at) {
            timespec result = {};
            result.tv_nsec = UTIME_OMIT;
            if (at)
                result = {static_cast<time_t>(at->seconds), static_cast<long>(std::min(at->nanoseconds, 999'999'999U))};
            return result;
        };
        return {time(info.accessed ? info.accessed : info.modified), time(info.modified)};
    }

    Result<void> set_properties(int fd, const FileInfo& info) {
        const bool owned = fchown(fd, info.user, info.group) == 0;
        if (!owned) not_kept("owners");
        if (fchmod(fd, kept_mode(info, owned)) != 0) not_kept("modes");
        TRY_VOID(set_attributes(info.inode, fmt::format("/proc/self/fd/{}", fd), true));
        if (futimens(fd, times_of(info).data()) != 0) not_kept("times");
        return {};
    }

    Result<void> set_node_properties(const FileInfo& info, int parent, const std::string& name) {
        const bool owned = fchownat(parent, name.c_str(), info.user, info.group, AT_SYMLINK_NOFOLLOW) == 0;
        if (!owned) not_kept("owners");
        // What was just made here is no link, unless it was made as one.
        if (info.type != FileType::symbolic_link && fchmodat(parent, name.c_str(), kept_mode(info, owned), 0) != 0)
            not_kept("modes");
        TRY_VOID(set_attributes(info.inode, fmt::format("/proc/self/fd/{}/{}", parent, name), false));
        if (utimensat(parent, name.c_str(), times_of(info).data(), AT_SYMLINK_NOFOLLOW) != 0) not_kept("times");
        return {};
    }

    Result<void> set_attributes(Inode inode, const std::string& path, bool follow) {
        for (const auto& [name, value] : TRY(files_.attributes(inode))) {
            if (name.find('\0') != std::string::npos) continue;
            const auto set = follow ? setxattr : lsetxattr;
            if (set(path.c_str(), name.c_str(), value.data(), value.size(), 0) != 0) not_kept("extended attributes");
        }
        return {};
    }

    FileSystem& files_;
    const ExtractOptions& options_;
    const ExtractItem* item_ = nullptr;  // what is being extracted
    std::vector<Above> above_;
    std::map<Inode, std::string> made_;  // files with several names, by their first path in the target
    std::mutex mutex_;                   // of the report while contents are copied
    ExtractReport report_;
};

}  // namespace

Result<ExtractReport> extract(FileSystem& files, const std::vector<ExtractItem>& items, const std::string& target,
                              const ExtractOptions& options) {
    return within_memory([&] { return Extraction(files, options).run(items, target); });
}

Result<void> read_contents(FileSystem& files, Inode inode, Disk* disk, unsigned workers,
                           const std::function<Result<void>(std::span<const std::byte>)>& take) {
    return within_memory([&] { return read_in_order(files, inode, disk, workers, take); });
}

}  // namespace qcow
