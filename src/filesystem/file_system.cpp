#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <set>

#include "base/bits.h"
#include "base/within_memory.h"
#include "filesystem/readers.h"
#ifdef QCOW_WITH_TSK
#include "filesystem/sleuth_library.h"
#endif
#include "qcow/filesystem.h"
#include "qcow/text.h"

namespace qcow {
namespace {

constexpr unsigned most_links = 40;  // as Linux
constexpr unsigned deepest = 4096;
constexpr std::size_t longest_name = 4096;
constexpr std::size_t most_refused = 100;

std::unexpected<Error> unsupported(std::string_view what) {
    return fail(Errc::unsupported, "", fmt::format("this file system {}", what));
}
std::unexpected<Error> not_written() {
    return unsupported("can only be read; ext2, ext3, ext4 and FAT can be changed");
}

/// As Linux has them (linux/posix_acl_xattr.h): a version, and entries of eight bytes.
bool is_acl(std::span<const std::byte> value) {
    constexpr std::array version = {std::byte{2}, std::byte{0}, std::byte{0}, std::byte{0}};
    return value.size() % 8 == version.size() && std::ranges::equal(value.first(version.size()), version);
}

/// Why no file has this attribute; empty: one may.
std::string_view flaw_of(const Attribute& attribute) {
    constexpr std::size_t longest = 255;  // as Linux
    constexpr auto spaces = std::to_array<std::string_view>({"user.", "trusted.", "security.", "system."});
    const std::string_view name = attribute.name;
    const bool has_space =
        std::ranges::any_of(spaces, [&](auto space) { return name.starts_with(space) && name.size() > space.size(); });
    if (!has_space || name == "system.data" || name.find('\0') != std::string_view::npos)
        return "an extended attribute has a name that Linux does not allow";
    if (name.size() > longest) return "an extended attribute has a name of more than 255 bytes";
    if (name.starts_with("system.posix_acl_") && !is_acl(attribute.value)) return "its ACL is damaged";
    return {};
}

/// Why no file system can hold this; empty: one may.
std::string_view flaw_of(const NewNode& node) {
    if (node.info.type == FileType::unknown) return "a new file needs a type";
    if (node.info.type == FileType::symbolic_link &&
        (node.link_target.empty() || node.link_target.find('\0') != std::string::npos))
        return "a symbolic link needs a target, which has no NUL";
    for (const auto& attribute : node.attributes)
        if (const auto flaw = flaw_of(attribute); !flaw.empty()) return flaw;
    return {};
}

}  // namespace

bool is_entry_name(std::string_view name) {
    return !name.empty() && name != "." && name != ".." && name.size() <= longest_name &&
           name.find('/') == std::string_view::npos && name.find('\0') == std::string_view::npos;
}

std::string inode_place(Inode inode) { return fmt::format("inode {}", inode); }

FileType type_of_mode(std::uint32_t mode) {
    switch (mode & S_IFMT) {
        case S_IFREG: return FileType::regular;
        case S_IFDIR: return FileType::directory;
        case S_IFLNK: return FileType::symbolic_link;
        case S_IFCHR: return FileType::character_device;
        case S_IFBLK: return FileType::block_device;
        case S_IFIFO: return FileType::fifo;
        case S_IFSOCK: return FileType::socket;
        default: return FileType::unknown;
    }
}

std::uint32_t mode_of_type(FileType type) {
    constexpr std::array<std::uint32_t, 8> modes = {0, S_IFREG, S_IFDIR, S_IFLNK, S_IFCHR, S_IFBLK, S_IFIFO, S_IFSOCK};
    return modes.at(static_cast<std::size_t>(type));
}

// ---- The boundary ----

template <class Work>
std::invoke_result_t<Work> FileSystem::run(Work&& work) {
    if (closed_) return fail(Errc::invalid_argument, "file system", "it was closed");
    return within_memory(std::forward<Work>(work));
}

Result<FileSystemInfo> FileSystem::info() {
    return run([&] { return do_info(); });
}
Result<FileInfo> FileSystem::stat(Inode inode) {
    return run([&] { return do_stat(inode); });
}

Result<std::vector<DirectoryEntry>> FileSystem::list(Inode directory, bool deleted, std::vector<Error>* refused) {
    return run([&]() -> Result<std::vector<DirectoryEntry>> {
        std::vector<Error> errors;
        auto entries = TRY(do_list(directory, deleted, errors));
        std::erase_if(entries, [&](const DirectoryEntry& entry) {
            if (is_entry_name(entry.name)) return false;
            if (errors.size() < most_refused) {
                errors.push_back({Errc::corrupt, fmt::format("directory {}", directory),
                                  fmt::format("it has an entry with the name \"{}\", which no entry can have",
                                              printable(entry.name, 64))});
            }
            return true;
        });
        if (errors.empty()) return entries;
        if (refused == nullptr) return std::unexpected(std::move(errors.front()));
        errors.resize(std::min(errors.size(), most_refused));
        *refused = std::move(errors);
        return entries;
    });
}

Result<DirectoryEntry> FileSystem::lookup(Inode directory, const std::string& name) {
    return run([&]() -> Result<DirectoryEntry> {
        if (!is_entry_name(name)) return fail(Errc::not_found, printable(name, 64), "no file has such a name");
        auto entry = TRY(do_lookup(directory, name));
        if (entry.type == FileType::unknown) entry.type = TRY(do_stat(entry.inode)).type;
        return entry;
    });
}

Result<std::size_t> FileSystem::read(Inode inode, std::uint64_t at, std::span<std::byte> to) {
    return run([&] { return do_read(inode, at, to); });
}
Result<std::vector<FileExtent>> FileSystem::extents(Inode inode, std::uint64_t at) {
    return run([&] { return do_extents(inode, at); });
}
Result<std::string> FileSystem::read_link(Inode inode) {
    return run([&] { return do_read_link(inode); });
}
Result<std::vector<Attribute>> FileSystem::attributes(Inode inode) {
    return run([&] { return do_attributes(inode); });
}

Result<Inode> FileSystem::create(Inode directory, const std::string& name, const NewNode& node) {
    return run([&]() -> Result<Inode> {
        if (!is_entry_name(name))
            return fail(Errc::invalid_argument, printable(name, 64), "this is no name for an entry of a directory");
        if (const auto flaw = flaw_of(node); !flaw.empty())
            return fail(Errc::invalid_argument, printable(name, 64), std::string(flaw));
        return do_create(directory, name, node);
    });
}

Result<void> FileSystem::write(Inode inode, std::uint64_t at, std::span<const std::byte> from) {
    return run([&] { return do_write(inode, at, from); });
}
Result<void> FileSystem::truncate(Inode inode, std::uint64_t size) {
    return run([&] { return do_truncate(inode, size); });
}
Result<void> FileSystem::remove(Inode directory, const std::string& name) {
    return run([&] { return do_remove(directory, name); });
}
Result<void> FileSystem::replace(Inode directory, const std::string& from, const std::string& to) {
    return run([&]() -> Result<void> {
        const auto made = TRY(lookup(directory, from));
        const auto old = TRY(lookup(directory, to));
        if (made.inode == old.inode) return {};  // as rename(2)
        if (made.type == FileType::directory || old.type == FileType::directory)
            return fail(Errc::invalid_argument, printable(to, 64), "a directory is not replaced, and replaces nothing");
        return do_replace(directory, made, old);
    });
}
Result<void> FileSystem::close() {
    return run([&] {
        closed_ = true;
        return do_close();
    });
}

// What a reader does not have.

Result<DirectoryEntry> FileSystem::do_lookup(Inode directory, const std::string& name) {
    std::vector<Error> refused;  // other entries
    auto entries = TRY(list(directory, false, &refused));
    const auto found = std::ranges::find(entries, name, &DirectoryEntry::name);
    if (found == entries.end()) return fail(Errc::not_found, printable(name, 64), "there is no such file in the disk");
    return std::move(*found);
}

Result<std::vector<FileExtent>> FileSystem::do_extents(Inode, std::uint64_t) {
    return unsupported("does not say where contents lie");
}
Result<std::string> FileSystem::do_read_link(Inode) { return unsupported("has no symbolic links"); }
Result<std::vector<Attribute>> FileSystem::do_attributes(Inode) { return std::vector<Attribute>(); }
Result<Inode> FileSystem::do_create(Inode, const std::string&, const NewNode&) { return not_written(); }
Result<void> FileSystem::do_write(Inode, std::uint64_t, std::span<const std::byte>) { return not_written(); }
Result<void> FileSystem::do_truncate(Inode, std::uint64_t) { return not_written(); }
Result<void> FileSystem::do_remove(Inode, const std::string&) { return not_written(); }
Result<void> FileSystem::do_replace(Inode, const DirectoryEntry&, const DirectoryEntry&) { return not_written(); }
Result<void> FileSystem::do_close() { return {}; }

// ---- Opening ----

namespace {

using Open = Result<std::unique_ptr<FileSystem>>(std::shared_ptr<Disk>, const Content&, Access);

struct Reader {
    std::string_view name;
    std::string_view package;
    std::vector<std::string_view> types;
    Open* open;  // null: not built
};

template <auto open>
Result<std::unique_ptr<FileSystem>> for_reading(std::shared_ptr<Disk> disk, const Content& content, Access access) {
    if (access == Access::write)
        return fail(Errc::unsupported, content.type, "it can only be read; ext2, ext3, ext4 and FAT can be changed");
    return open(std::move(disk), content);
}

#ifdef QCOW_WITH_EXT2FS
constexpr Open* read_ext = open_ext;
#else
constexpr Open* read_ext = nullptr;
#endif
#ifdef QCOW_WITH_TSK
constexpr Open* read_sleuth = for_reading<open_sleuth>;
#else
constexpr Open* read_sleuth = nullptr;
#endif
#ifdef QCOW_WITH_SQFS
constexpr Open* read_squash = for_reading<open_squash>;
#else
constexpr Open* read_squash = nullptr;
#endif
#ifdef QCOW_WITH_LIBARCHIVE
constexpr Open* read_archive = for_reading<open_archive>;
#else
constexpr Open* read_archive = nullptr;
#endif

const std::array readers = {
    Reader{"libext2fs", "libext2fs-dev", {"ext2", "ext3", "ext4"}, read_ext},
    Reader{"The Sleuth Kit", "libtsk-dev", {"vfat", "exfat", "ntfs", "hfsplus", "hfs", "ufs"}, read_sleuth},
    Reader{"libsquashfs", "libsquashfs-dev", {"squashfs"}, read_squash},
    // The Sleuth Kit reads ISO 9660, too, but not its symbolic links.
    Reader{"libarchive", "libarchive-dev", {"iso9660", "tar", "cpio", "zip", "7z"}, read_archive},
};

Result<std::unique_ptr<FileSystem>> opened(std::shared_ptr<Disk> disk, Access access) {
    const auto content = TRY(identify(*disk));
    if (access == Access::write && content.type == "vfat") return change_fat(std::move(disk), content);
    for (const auto& reader : readers) {
        if (std::ranges::find(reader.types, content.type) == reader.types.end()) continue;
        if (reader.open != nullptr) return reader.open(std::move(disk), content, access);
        return fail(
            Errc::unsupported, content.type,
            fmt::format("qcowkit was built without {}, which reads it (Debian: {})", reader.name, reader.package));
    }
    if (!content.type.empty())
        return fail(Errc::unsupported, content.type, "nothing in qcowkit reads the files of this");
    // YAFFS2 has no signature.
    if (const auto open = readers.at(1).open; open != nullptr)
        if (auto found = open(std::move(disk), content, access)) return found;
    return fail(Errc::unsupported, "", "no file system is known here");
}

}  // namespace

Result<std::unique_ptr<FileSystem>> open_file_system(std::shared_ptr<Disk> disk, Access access) {
    return within_memory([&] { return opened(std::move(disk), access); });
}

void load_file_systems() {
#ifdef QCOW_WITH_TSK
    static_cast<void>(load_sleuth_kit());  // without it, opening tells why
#endif
#ifdef QCOW_WITH_LIBARCHIVE
    load_archive_locale();
#endif
}

// ---- Paths ----

namespace {

/// The names in a path, the last one first.
std::vector<std::string> reversed_names(std::string_view path) {
    std::vector<std::string> names;
    while (!path.empty()) {
        const auto end = std::min(path.find('/'), path.size());
        if (end > 0) names.emplace_back(path.substr(0, end));
        path.remove_prefix(std::min(end + 1, path.size()));
    }
    std::ranges::reverse(names);
    return names;
}

Result<Inode> found(FileSystem& files, std::string_view path, bool follow) {
    std::vector<Inode> above = {files.root()};  // the directories on the way, for ".."
    auto left = reversed_names(path);
    unsigned links = 0;
    Inode here = files.root();
    while (!left.empty()) {
        const auto name = std::move(left.back());
        left.pop_back();
        if (name == ".") continue;
        if (name == "..") {
            if (above.size() > 1) above.pop_back();
            here = above.back();
            continue;
        }
        const auto place = printable(path, 256);
        if (TRY(files.stat(above.back())).type != FileType::directory) {
            return fail(Errc::invalid_argument, place,
                        fmt::format("what is in front of \"{}\" is no directory", printable(name, 64)));
        }
        const auto entry = files.lookup(above.back(), name);
        if (!entry && entry.error().code == Errc::not_found)
            return fail(Errc::not_found, place, "there is no such file in the disk");
        here = TRY(entry).inode;
        const auto type = entry->type;
        if (type == FileType::symbolic_link && (follow || !left.empty())) {
            if (++links > most_links) return fail(Errc::limit_exceeded, place, "too many symbolic links");
            const auto target = TRY(files.read_link(here));
            if (target.starts_with('/')) above.resize(1);
            here = above.back();
            for (auto& part : reversed_names(target)) left.push_back(std::move(part));
            if (left.size() > deepest) return fail(Errc::limit_exceeded, place, "the path is too long");
            continue;
        }
        if (!left.empty() || type == FileType::directory) above.push_back(here);
        if (above.size() > deepest) return fail(Errc::limit_exceeded, place, "the path is too long");
    }
    return here;
}

class Walk {
public:
    Walk(FileSystem& files, const WalkOptions& options, const std::function<Result<Descend>(const Visited&)>& visit)
        : files_(files), options_(options), visit_(visit) {}

    Result<void> run(Inode start) {
        Visited top;
        top.entry.inode = start;
        top.info = TRY(files_.stat(start));
        top.entry.type = top.info.type;
        stack_.push_back(std::move(top));
        while (!stack_.empty()) {
            const auto visited = std::move(stack_.back());
            stack_.pop_back();
            TRY_VOID(step(visited));
        }
        return {};
    }

private:
    Result<void> step(const Visited& visited) {
        const auto descend = TRY(visit_(visited));
        if (descend == Descend::no || visited.info.type != FileType::directory || visited.entry.deleted) return {};
        if (visited.depth >= deepest) return failed(visited.path, {Errc::limit_exceeded, "", "it lies too deep"});
        if (!entered_.insert(visited.entry.inode).second)
            return failed(visited.path, {Errc::corrupt, "", "the directory has two places in the file system"});
        std::vector<Error> refused;
        auto entries = files_.list(visited.entry.inode, options_.deleted, &refused);
        if (!entries) return failed(visited.path, std::move(entries).error());
        for (auto& error : refused) TRY_VOID(failed(visited.path, std::move(error)));
        std::ranges::sort(*entries, std::greater(), &DirectoryEntry::name);
        for (auto& entry : *entries) {
            Visited next;
            next.path = visited.path.empty() ? entry.name : visited.path + "/" + entry.name;
            next.depth = visited.depth + 1;
            auto info = files_.stat(entry.inode);
            if (info) {
                next.info = *std::move(info);
            } else if (entry.deleted) {
                next.info.inode = entry.inode;  // what is left of a deleted file may be only its name
                next.info.type = entry.type;
                next.info.deleted = true;
            } else {
                TRY_VOID(failed(next.path, std::move(info).error()));
                continue;
            }
            next.entry = std::move(entry);
            stack_.push_back(std::move(next));
        }
        return {};
    }

    Result<void> failed(const std::string& path, Error error) {
        if (!options_.failed) return std::unexpected(std::move(error).in(printable(path.empty() ? "/" : path, 256)));
        options_.failed(path, error);
        return {};
    }

    FileSystem& files_;
    const WalkOptions& options_;
    const std::function<Result<Descend>(const Visited&)>& visit_;
    std::vector<Visited> stack_;
    std::set<Inode> entered_;
};

}  // namespace

Result<Inode> find_path(FileSystem& files, std::string_view path, bool follow) {
    return within_memory([&] { return found(files, path, follow); });
}

Result<void> walk(FileSystem& files, Inode start, const WalkOptions& options,
                  const std::function<Result<Descend>(const Visited&)>& visit) {
    return within_memory([&] { return Walk(files, options, visit).run(start); });
}

}  // namespace qcow
