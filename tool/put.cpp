// qcow put, rm and mkdir: change the file system of a disk in place.

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <utility>

#include "command.h"
#include "confined.h"
#include "inside.h"
#include "keys.h"
#include "qcow/text.h"

namespace tool {
namespace {

struct PutOptions {
    Target disk;
    std::optional<unsigned> partition;
    std::vector<std::string> paths;
    bool recursive = false;
    bool parents = false;
    bool root_owner = false;
};

qcow::Error error_of(qcow::Errc code, const std::string& place, std::string what) {
    return {code, qcow::printable(place, 1000), std::move(what)};
}
std::unexpected<qcow::Error> refuse_path(const std::string& place, std::string what) {
    return std::unexpected(error_of(qcow::Errc::invalid_argument, place, std::move(what)));
}
std::unexpected<qcow::Error> system_failure(const std::string& place) {
    return std::unexpected(error_of(qcow::Errc::io, place, std::strerror(errno)));
}

/// Gives an error the path in the disk, in place of the number or the bare name that a file system knows.
template <class T>
qcow::Result<T> within(const std::string& path, qcow::Result<T> result) {
    if (result) return result;
    auto error = std::move(result).error();
    const auto end = error.place.find(": ");
    const auto first = error.place.substr(0, end);
    if (first.starts_with("inode ") || qcow::printable(path).ends_with(first))
        error.place.erase(0, end == std::string::npos ? end : end + 2);
    return std::unexpected(std::move(error).in(qcow::printable(path, 1000)));
}

/// What the work on a file system is told, and tells.
struct Work {
    std::stop_token stop;
    bool changed = false;  // files were put, made or removed
};

/// Asked before each piece of work, and not within one.
qcow::Result<void> verify_goes_on(const std::stop_token& stop) {
    if (!stop.stop_requested()) return {};
    return std::unexpected(qcow::Error{qcow::Errc::cancelled, "", "stopped; what was done before is in the disk"});
}

/// Opens the file system for writing, in the confined process, and calls `perform`. What was done before an error or a
/// signal is completed, so the file system is whole.
qcow::Result<int> change_files(const PutOptions& options,
                               const std::function<qcow::Result<void>(qcow::FileSystem&, Work&)>& perform) {
    // The confined process inherits that these signals are blocked.
    const StopOnSignals signals;
    std::shared_ptr<qcow::Image> image;
    Confined confined;
    confined.access = qcow::Access::write;
    confined.open = [&]() -> qcow::Result<std::shared_ptr<qcow::Disk>> {
        image = QCOW_TRY(open(QCOW_TRY(spec_of(options.disk))));
        warn_of_unused_keys();
        return qcow::file_system_disk(image, options.partition);
    };
    confined.close = [&] { return image->close(); };
    auto files = open_confined(confined);
    forget_keys();
    if (!files) {
        // What concerns the image names it.
        const auto place = place_of(options.disk.path, options.partition);
        auto error = std::move(files).error();
        return std::unexpected(error.place.starts_with(place) ? std::move(error) : std::move(error).in(place));
    }
    Work work{signals.token()};
    auto done = perform(**files, work);
    auto closed = (*files)->close();
    if (!closed) return std::unexpected(std::move(done ? closed : done).error());
    if (done) return ok;
    auto error = std::move(done).error();
    if (work.changed && error.code != qcow::Errc::cancelled) error.what += "; what was done before stays in the disk";
    return std::unexpected(std::move(error));
}

std::pair<std::string, std::string> split_path(std::string path) {
    while (path.size() > 1 && path.ends_with('/')) path.pop_back();
    const auto slash = path.rfind('/');
    if (slash == std::string::npos) return {"/", path};
    return {path.substr(0, slash + 1), path.substr(slash + 1)};
}

std::string below(std::string path, const std::string& name) {
    if (!path.ends_with('/')) path += '/';
    return path + name;
}

qcow::Result<std::optional<qcow::DirectoryEntry>> entry_of(qcow::FileSystem& files, qcow::Inode directory,
                                                           const std::string& name) {
    auto found = files.lookup(directory, name);
    if (found) return *std::move(found);
    if (found.error().code == qcow::Errc::not_found) return std::nullopt;
    return std::unexpected(std::move(found).error());
}

// ---- put ----

qcow::FileType type_of(mode_t mode) {
    using enum qcow::FileType;
    if (S_ISREG(mode)) return regular;
    if (S_ISDIR(mode)) return directory;
    if (S_ISLNK(mode)) return symbolic_link;
    if (S_ISCHR(mode)) return character_device;
    if (S_ISBLK(mode)) return block_device;
    if (S_ISFIFO(mode)) return fifo;
    return S_ISSOCK(mode) ? socket : unknown;
}

std::vector<qcow::Attribute> attributes_of(const std::string& path) {
    std::vector<qcow::Attribute> attributes;
    std::string names(65536, '\0');
    const auto length = llistxattr(path.c_str(), names.data(), names.size());
    if (length <= 0) return attributes;
    for (std::size_t at = 0; at < static_cast<std::size_t>(length);) {
        const std::string name = names.c_str() + at;
        at += name.size() + 1;
        std::vector<std::byte> value(65536);
        const auto size = lgetxattr(path.c_str(), name.c_str(), value.data(), value.size());
        if (size < 0) continue;
        value.resize(static_cast<std::size_t>(size));
        attributes.push_back({name, std::move(value)});
    }
    return attributes;
}

/// Copies files of this machine into the file system.
class Putting {
public:
    Putting(qcow::FileSystem& files, const PutOptions& options, const qcow::FilesInUse& in_use, Work& work,
            bool keeps_attributes)
        : files_(files), options_(options), in_use_(in_use), work_(work), keeps_attributes_(keeps_attributes) {}

    /// Copies a file of this machine, and all below it, to `path` in the disk: to the name in this directory.
    // NOLINTNEXTLINE(misc-no-recursion): as deep as the directories of this machine
    qcow::Result<void> put(const std::string& source, qcow::Inode directory, const std::string& path) {
        QCOW_TRY_VOID(verify_goes_on(work_.stop));
        struct stat status = {};
        if (lstat(source.c_str(), &status) != 0) return system_failure(source);
        const bool is_directory = S_ISDIR(status.st_mode);
        if (S_ISREG(status.st_mode))
            QCOW_TRY_VOID(qcow::FilesInUse(in_use_).add(qcow::FilesInUse::Use::read, source, "a file to put into it"));
        const auto name = split_path(path).second;
        const auto existing = QCOW_TRY(within(path, entry_of(files_, directory, name)));
        if (existing && existing->type == qcow::FileType::directory) {
            if (!is_directory) return refuse_path(path, "a directory with this name is in the disk");
            return put_entries(source, existing->inode, path);
        }
        if (is_directory && existing)
            return refuse_path(path, "a file with this name is in the disk, and no directory");
        const auto node = QCOW_TRY(node_of(source, status));
        if (is_directory) {
            const auto made = QCOW_TRY(within(path, files_.create(directory, name, node)));
            work_.changed = true;
            return put_entries(source, made, path);
        }
        // The existing file stays until the new one is complete.
        const auto new_name = existing ? QCOW_TRY(unused_name(directory)) : name;
        const auto made = QCOW_TRY(within(path, files_.create(directory, new_name, node)));
        auto written = S_ISREG(status.st_mode) ? put_contents(source, made, static_cast<std::uint64_t>(status.st_size))
                                               : qcow::Result<void>();
        if (written && existing) written = files_.replace(directory, new_name, name);
        if (written) {
            work_.changed = true;
            return {};
        }
        auto removed = files_.remove(directory, new_name);  // no half files
        auto error = within(path, std::move(written)).error();
        if (!removed) {
            error.what +=
                fmt::format("; and the part that was written cannot be removed: {}", removed.error().message());
        }
        return std::unexpected(std::move(error).in(qcow::printable(source, 1000)));
    }

private:
    /// A name for a file that is not complete.
    qcow::Result<std::string> unused_name(qcow::Inode directory) const {
        for (unsigned i = 0;; ++i) {
            auto name = fmt::format(".qcow-put-{}", i);
            if (!QCOW_TRY(entry_of(files_, directory, name))) return name;
        }
    }

    qcow::Result<qcow::NewNode> node_of(const std::string& source, const struct stat& status) {
        qcow::NewNode node;
        auto& info = node.info;
        info.type = type_of(status.st_mode);
        info.mode = status.st_mode & 07777U;
        info.user = options_.root_owner ? 0 : status.st_uid;
        info.group = options_.root_owner ? 0 : status.st_gid;
        info.major = major(status.st_rdev);
        info.minor = minor(status.st_rdev);
        info.modified = qcow::Timestamp{status.st_mtim.tv_sec, static_cast<std::uint32_t>(status.st_mtim.tv_nsec)};
        info.accessed = qcow::Timestamp{status.st_atim.tv_sec, static_cast<std::uint32_t>(status.st_atim.tv_nsec)};
        if (info.type == qcow::FileType::symbolic_link) {
            std::string target(65536, '\0');
            const auto length = readlink(source.c_str(), target.data(), target.size());
            if (length < 0) return system_failure(source);
            target.resize(static_cast<std::size_t>(length));
            node.link_target = std::move(target);
        }
        node.attributes = attributes_of(source);
        if (!keeps_attributes_ && !node.attributes.empty()) {
            if (!std::exchange(warned_, true))
                complain("warning: FAT has no extended attributes; those of the files are left out");
            node.attributes.clear();
        }
        return node;
    }

    // NOLINTNEXTLINE(misc-no-recursion): with put()
    qcow::Result<void> put_entries(const std::string& source, qcow::Inode directory, const std::string& path) {
        DIR* const opened = opendir(source.c_str());
        if (opened == nullptr) return system_failure(source);
        std::vector<std::string> names;
        while (const auto* const entry = readdir(opened)) names.emplace_back(entry->d_name);
        closedir(opened);
        std::ranges::sort(names);
        for (const auto& name : names) {
            if (name != "." && name != "..")
                QCOW_TRY_VOID(put(fmt::format("{}/{}", source, name), directory, below(path, name)));
        }
        return {};
    }

    qcow::Result<void> put_contents(const std::string& source, qcow::Inode made, std::uint64_t size) {
        const int file = ::open(source.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
        if (file < 0) return system_failure(source);
        auto done = copy(source, file, made, size);
        close(file);
        return done;
    }

    /// Holes stay holes.
    qcow::Result<void> copy(const std::string& source, int file, qcow::Inode made, std::uint64_t size) {
        std::vector<std::byte> buffer(std::size_t{1} << 20);
        off_t at = 0;
        while (true) {
            const off_t data = lseek(file, at, SEEK_DATA);
            if (data < 0 && errno == ENXIO) break;  // no more data
            if (data < 0) return system_failure(source);
            const off_t end = lseek(file, data, SEEK_HOLE);
            if (end < 0) return system_failure(source);
            for (at = data; at < end;) {
                QCOW_TRY_VOID(verify_goes_on(work_.stop));
                const auto part = std::min<std::size_t>(buffer.size(), static_cast<std::size_t>(end - at));
                const auto got = pread(file, buffer.data(), part, at);
                if (got < 0) return system_failure(source);
                if (got == 0) return refuse_path(source, "the file became shorter while it was read");
                QCOW_TRY_VOID(files_.write(made, static_cast<std::uint64_t>(at),
                                           std::span(buffer).first(static_cast<std::size_t>(got))));
                at += got;
            }
        }
        if (static_cast<std::uint64_t>(at) < size) return files_.truncate(made, size);
        return {};
    }

    qcow::FileSystem& files_;
    const PutOptions& options_;
    const qcow::FilesInUse& in_use_;  // those of the disk
    Work& work_;
    bool keeps_attributes_;
    bool warned_ = false;  // that it does not
};

qcow::Result<int> run_put(const PutOptions& options) {
    qcow::FilesInUse in_use;
    QCOW_TRY_VOID(in_use.add_unopened(qcow::FilesInUse::Use::written, QCOW_TRY(spec_of(options.disk)), "the disk"));
    return change_files(options, [&](qcow::FileSystem& files, Work& work) -> qcow::Result<void> {
        const auto sources = std::span(options.paths).first(options.paths.size() - 1);
        const auto& target = options.paths.back();
        Putting putting(files, options, in_use, work, QCOW_TRY(files.info()).type != "vfat");
        const auto place = qcow::find_path(files, target);
        const bool into = place && QCOW_TRY(files.stat(*place)).type == qcow::FileType::directory;
        if (!into && (sources.size() > 1 || target.ends_with('/')))
            return refuse_path(target, "there is no such directory in the disk; make it with qcow mkdir");
        for (const auto& source : sources) {
            if (into) {
                const auto name = split_path(source).second;
                if (name.empty() || name == "." || name == "..")
                    return refuse_path(source, "give a name, and not a place");
                QCOW_TRY_VOID(putting.put(source, *place, below(target, name)));
            } else {
                const auto above = QCOW_TRY(qcow::find_path(files, split_path(target).first));
                QCOW_TRY_VOID(putting.put(source, above, target.starts_with('/') ? target : "/" + target));
            }
        }
        return {};
    });
}

// ---- rm ----

/// `entered` gets the directories.
// NOLINTNEXTLINE(misc-no-recursion): no directory is entered twice, and the depth has a limit
qcow::Result<void> remove_below(qcow::FileSystem& files, qcow::Inode directory, const std::string& path,
                                std::set<qcow::Inode>& entered, Work& work, unsigned depth = 0) {
    constexpr unsigned deepest = 1000;
    if (depth > deepest) return refuse_path(path, "the directories are too deep");
    if (!entered.insert(directory).second) return refuse_path(path, "the directory has two places in the file system");
    for (const auto& entry : QCOW_TRY(within(path, files.list(directory)))) {
        QCOW_TRY_VOID(verify_goes_on(work.stop));
        const auto place = below(path, entry.name);
        const auto type =  // not all file systems have it in the entry
            entry.type == qcow::FileType::unknown ? QCOW_TRY(within(place, files.stat(entry.inode))).type : entry.type;
        if (type == qcow::FileType::directory)
            QCOW_TRY_VOID(remove_below(files, entry.inode, place, entered, work, depth + 1));
        QCOW_TRY_VOID(within(place, files.remove(directory, entry.name)));
        work.changed = true;
    }
    return {};
}

qcow::Result<int> run_rm(const PutOptions& options) {
    return change_files(options, [&](qcow::FileSystem& files, Work& work) -> qcow::Result<void> {
        for (const auto& path : options.paths) {
            const auto [above, name] = split_path(path);
            if (name.empty() || name == "." || name == "..") return refuse_path(path, "this cannot be removed");
            const auto directory = QCOW_TRY(qcow::find_path(files, above));
            const auto entry = QCOW_TRY(within(path, entry_of(files, directory, name)));
            if (!entry)
                return std::unexpected(error_of(qcow::Errc::not_found, path, "there is no such file in the disk"));
            if (entry->type == qcow::FileType::directory) {
                if (options.recursive) {
                    std::set<qcow::Inode> entered;
                    QCOW_TRY_VOID(remove_below(files, entry->inode, path, entered, work));
                } else if (!QCOW_TRY(within(path, files.list(entry->inode))).empty()) {
                    return refuse_path(path, "the directory is not empty; --recursive removes what is in it, too");
                }
            }
            QCOW_TRY_VOID(within(path, files.remove(directory, name)));
            work.changed = true;
        }
        return {};
    });
}

// ---- mkdir ----

qcow::Result<qcow::Inode> make_directory(qcow::FileSystem& files, qcow::Inode above, const std::string& name) {
    qcow::NewNode node;
    node.info.type = qcow::FileType::directory;
    node.info.mode = 0755;
    const timespec now = [] {
        timespec time = {};
        clock_gettime(CLOCK_REALTIME, &time);
        return time;
    }();
    node.info.modified = qcow::Timestamp{now.tv_sec, static_cast<std::uint32_t>(now.tv_nsec)};
    node.info.accessed = node.info.modified;
    return files.create(above, name, node);
}

qcow::Result<int> run_mkdir(const PutOptions& options) {
    return change_files(options, [&](qcow::FileSystem& files, Work& work) -> qcow::Result<void> {
        for (const auto& path : options.paths) {
            if (!options.parents) {
                const auto [above, name] = split_path(path);
                const auto directory = qcow::find_path(files, above);
                if (!directory && directory.error().code == qcow::Errc::not_found) {
                    return std::unexpected(error_of(qcow::Errc::not_found, above,
                                                    "there is no such directory in the disk; --parents makes it, too"));
                }
                QCOW_TRY(within(path, make_directory(files, QCOW_TRY(directory), name)));
                work.changed = true;
                continue;
            }
            std::string sofar;
            qcow::Inode here = files.root();
            for (std::size_t at = 0; at < path.size();) {
                const auto end = std::min(path.find('/', at), path.size());
                const auto name = path.substr(at, end - at);
                at = end + 1;
                if (name.empty()) continue;
                sofar += "/" + name;
                const auto found = qcow::find_path(files, sofar);
                here = found ? *found : QCOW_TRY(within(sofar, make_directory(files, here, name)));
                work.changed |= !found;
            }
        }
        return {};
    });
}

void add_changed_disk(CLI::App& app, PutOptions& options) {
    app.add_option("DISK", options.disk.path, "Image file or block device that is changed; DISK:N is its partition N")
        ->required()
        ->check(name_text)
        ->transform(CLI::Validator(
            [&options](std::string& name) -> std::string {
                const auto [front, partition] = split_partition(name);
                auto parsed = qcow::parse_location(front);
                if (!parsed) return parsed.error().message();
                if (parsed->alone) return "an image without its backing file can be only read";
                options.partition = partition;
                name = parsed->path;
                options.disk.location = *std::move(parsed);
                return {};
            },
            ""));
    add_change_options(app, options.disk);
}

}  // namespace

void declare_put(CLI::App& root, int& status) {
    const auto options = std::make_shared<PutOptions>();
    auto& app = declare(root, status, "put", "Copy files and directories into the file system of a disk, in place",
                        "The file system is ext2, ext3, ext4 or FAT, and nothing else uses the disk. Owners, modes, "
                        "times, symbolic links,\n"
                        "holes, device nodes and extended attributes are kept in ext. FAT keeps times of files, and "
                        "holds only files and\n"
                        "directories. A hard link becomes a file of its own. A file with the same name is replaced "
                        "when the new one is\n"
                        "complete, so there must be space for both. Directories get the new files. An overlay takes "
                        "the changes, not its\n"
                        "backing file.\n"
                        "Examples:\n"
                        "  qcow put disk.qcow2:2 motd /etc/motd\n"
                        "  qcow put --owner-root disk.qcow2:2 scripts /usr/local",
                        [options] { return run_put(*options); });
    add_changed_disk(app, *options);
    app.add_option("PATH", options->paths, "Files of this machine, and at last where they go in the disk")
        ->required()
        ->expected(2, -1);
    app.add_flag("--owner-root", options->root_owner, "Root owns the files in the disk, whoever owns them here");
}

void declare_rm(CLI::App& root, int& status) {
    const auto options = std::make_shared<PutOptions>();
    auto& app = declare(root, status, "rm", "Remove files from the file system of a disk, in place",
                        "The file system is ext2, ext3, ext4 or FAT, and nothing else uses the disk.\n"
                        "Examples:\n"
                        "  qcow rm disk.qcow2:2 /etc/machine-id\n"
                        "  qcow rm -r disk.qcow2:2 /var/cache/apt",
                        [options] { return run_rm(*options); });
    add_changed_disk(app, *options);
    app.add_option("PATH", options->paths, "Files in the disk")->required()->expected(1, -1);
    app.add_flag("-r,--recursive", options->recursive, "Also remove directories, with all that is in them");
}

void declare_mkdir(CLI::App& root, int& status) {
    const auto options = std::make_shared<PutOptions>();
    auto& app = declare(
        root, status, "mkdir", "Make directories in the file system of a disk, in place",
        "The file system is ext2, ext3, ext4 or FAT, and nothing else uses the disk. Root owns the directories.\n"
        "Examples:\n"
        "  qcow mkdir -p disk.qcow2:2 /srv/data/new",
        [options] { return run_mkdir(*options); });
    add_changed_disk(app, *options);
    app.add_option("PATH", options->paths, "Directories in the disk")->required()->expected(1, -1);
    app.add_flag("-p,--parents", options->parents, "Also make those above, and accept those that exist");
}

}  // namespace tool
