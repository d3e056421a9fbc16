// Files of a disk become a tar archive, by libarchive.

#include <archive.h>
#include <archive_entry.h>
#include <unistd.h>

#include <cerrno>
#include <map>
#include <memory>
#include <set>

#include "base/within_memory.h"
#include "filesystem/little_endian.h"
#include "filesystem/readers.h"
#include "operation/extract_item.h"
#include "qcow/text.h"
#include "storage/file.h"

namespace qcow {
namespace {

struct CloseWriter {
    void operator()(archive* open) const { archive_write_free(open); }
};
struct FreeEntry {
    void operator()(archive_entry* entry) const { archive_entry_free(entry); }
};

class TarWriter {
public:
    TarWriter(FileSystem& files, const ExtractOptions& options, int descriptor)
        : files_(files),
          options_(options),
          descriptor_(descriptor),
          archive_(archive_write_new()),
          entry_(archive_entry_new()) {}

    Result<ExtractReport> run(const std::vector<ExtractItem>& items) {
        std::set<std::string_view> names;
        for (const auto& item : items) {
            if (!names.insert(item.name).second) {
                return fail(Errc::invalid_argument, printable(shown_path(item, ""), 256),
                            "another file gets the same name in the archive; make an archive of each");
            }
        }
        if (!archive_ || !entry_) return fail(Errc::no_memory, "", "out of memory");
        auto* const it = archive_.get();
        archive_write_set_format_pax(it);  // the restricted format leaves out nanoseconds
        // As GNU tar has them, and not twice.
        archive_write_set_format_option(it, "pax", "xattrheader", "SCHILY");
        archive_write_set_bytes_per_block(it, 1 << 20);
        archive_write_set_bytes_in_last_block(it, 512);
        if (archive_write_open(it, this, nullptr, write, nullptr) != ARCHIVE_OK) return failed();
        for (const auto& item : items) {
            WalkOptions walking;
            if (options_.failed) {
                walking.failed = [&](const std::string& path, const Error& error) {
                    note(shown_path(item, path), error);
                };
            }
            TRY_VOID(walk(files_, item.inode, walking, [&](const Visited& visited) { return visit(visited, item); }));
        }
        if (archive_write_close(it) != ARCHIVE_OK) return failed();
        return std::move(report_);
    }

private:
    static la_ssize_t write(archive* it, void* data, const void* from, std::size_t length) {
        const auto& self = *static_cast<TarWriter*>(data);
        while (true) {
            const auto done = ::write(self.descriptor_, from, length);
            if (done >= 0) return done;
            if (errno == EINTR) continue;
            archive_set_error(it, errno, "cannot write");
            return -1;
        }
    }

    std::unexpected<Error> failed() {
        const int error = archive_errno(archive_.get());
        if (error != 0) return system_error("cannot write", "archive", error);
        const auto* const text = archive_error_string(archive_.get());
        return fail(Errc::io, "archive", text == nullptr ? "cannot write" : printable(text, 300));
    }

    void note(const std::string& path, const Error& error) {
        ++report_.failed;
        options_.failed(path, error);
    }

    Result<Descend> visit(const Visited& visited, const ExtractItem& item) {
        const auto shown = shown_path(item, visited.path);
        std::string path = item.name;
        if (!path.empty() && !visited.path.empty()) path += '/';
        path += visited.path;
        if (path.empty()) path = ".";
        auto ready = prepare(visited, path);
        if (!ready) {
            if (!options_.failed) return std::unexpected(std::move(ready).error().in(printable(shown, 256)));
            note(shown, ready.error());
            return Descend::no;
        }
        if (!*ready) return Descend::no;
        if (archive_write_header(archive_.get(), entry_.get()) < ARCHIVE_WARN) return failed();
        ++report_.files;
        if (archive_entry_hardlink(entry_.get()) == nullptr && visited.info.type == FileType::regular)
            TRY_VOID(write_contents(visited.info, shown));
        return visited.info.type == FileType::directory ? Descend::yes : Descend::no;
    }

    /// Fills the header. Returns false if the archive has no such kind of file.
    Result<bool> prepare(const Visited& visited, const std::string& path) {
        auto* const entry = archive_entry_clear(entry_.get());
        const auto& info = visited.info;
        if (info.type == FileType::socket) return false;
        if (info.type == FileType::unknown)
            return fail(Errc::unsupported, "", "this is no kind of file that can be extracted");
        archive_entry_set_pathname(entry, path.c_str());
        archive_entry_set_filetype(entry, mode_of_type(info.type));
        archive_entry_set_perm(entry, static_cast<__LA_MODE_T>(info.mode));
        archive_entry_set_uid(entry, info.user);
        archive_entry_set_gid(entry, info.group);
        if (info.modified) set_mtime(*info.modified);
        archive_entry_set_rdevmajor(entry, info.major);
        archive_entry_set_rdevminor(entry, info.minor);
        archive_entry_set_size(entry, info.type == FileType::regular ? static_cast<la_int64_t>(info.size) : 0);
        if (info.type != FileType::directory && info.links > 1) {
            const auto [first, fresh] = made_.try_emplace(info.inode, path);
            if (!fresh) {
                archive_entry_set_hardlink(entry, first->second.c_str());
                archive_entry_set_size(entry, 0);
                return true;
            }
        }
        if (info.type == FileType::regular) set_runs(info);
        if (info.type == FileType::symbolic_link)
            archive_entry_set_symlink(entry, TRY(files_.read_link(info.inode)).c_str());
        for (const auto& [name, value] : TRY(files_.attributes(info.inode))) {
            if (name == "system.posix_acl_access") {
                add_acl(value, ARCHIVE_ENTRY_ACL_TYPE_ACCESS);
            } else if (name == "system.posix_acl_default") {
                add_acl(value, ARCHIVE_ENTRY_ACL_TYPE_DEFAULT);
            } else {
                archive_entry_xattr_add_entry(entry, name.c_str(), value.data(), value.size());
            }
        }
        return true;
    }

    /// pax has times as decimal numbers. libarchive writes the seconds, a point and the nanoseconds, also for a
    /// negative number.
    void set_mtime(Timestamp time) {
        if (time.seconds < 0 && time.nanoseconds != 0) {
            // There is no -0, so the fraction of the second before 1970 is lost.
            time.nanoseconds = time.seconds == -1 ? 0 : 1'000'000'000 - time.nanoseconds;
            if (time.seconds != -1) ++time.seconds;
        }
        archive_entry_set_mtime(entry_.get(), time.seconds, static_cast<long>(time.nanoseconds));
    }

    /// Says which runs of a file hold data, if it has holes. Errors show up again when the contents are read.
    void set_runs(const FileInfo& info) {
        constexpr std::size_t most_runs = FileSystem::most_extents;
        std::vector<FileExtent> runs;
        std::uint64_t stored = 0;
        for (std::uint64_t at = 0; at < info.size;) {
            const auto extents = files_.extents(info.inode, at);
            if (!extents || extents->empty()) return;
            for (const auto& extent : *extents) {
                if (extent.at != at || extent.length == 0 || extent.length > info.size - at) return;
                at += extent.length;
                if (!extent.stored) continue;
                runs.push_back(extent);
                stored += extent.length;
            }
            if (runs.size() > most_runs) return;
        }
        if (stored == info.size) return;
        if (runs.empty()) runs.push_back({info.size, 0, {}});
        for (const auto& run : runs) {
            archive_entry_sparse_add_entry(entry_.get(), static_cast<la_int64_t>(run.at),
                                           static_cast<la_int64_t>(run.length));
        }
    }

    /// Archives have ACLs as text, and Linux has them as entries of eight bytes behind a version
    /// (linux/posix_acl_xattr.h).
    void add_acl(std::span<const std::byte> value, int type) {
        for (std::size_t at = 4; at + 8 <= value.size(); at += 8) {
            const auto permissions = load_le<std::uint16_t>(value, at + 2) & 7;
            const auto id = static_cast<int>(load_le<std::uint32_t>(value, at + 4));
            const auto add = [&](int tag) {
                archive_entry_acl_add_entry(entry_.get(), type, permissions, tag, id, nullptr);
            };
            switch (load_le<std::uint16_t>(value, at)) {
                case 0x01: add(ARCHIVE_ENTRY_ACL_USER_OBJ); break;
                case 0x02: add(ARCHIVE_ENTRY_ACL_USER); break;
                case 0x04: add(ARCHIVE_ENTRY_ACL_GROUP_OBJ); break;
                case 0x08: add(ARCHIVE_ENTRY_ACL_GROUP); break;
                case 0x10: add(ARCHIVE_ENTRY_ACL_MASK); break;
                case 0x20: add(ARCHIVE_ENTRY_ACL_OTHER); break;
                default: break;
            }
        }
    }

    /// What is written in a header cannot be taken back. So contents that cannot be read become zeros.
    Result<void> write_contents(const FileInfo& info, const std::string& shown) {
        std::uint64_t done = 0;
        Result<void> written;
        auto read =
            read_contents(files_, info.inode, options_.disk, options_.workers, [&](std::span<const std::byte> bytes) {
                written = add(bytes);
                done += bytes.size();
                report_.bytes += bytes.size();
                if (options_.progress) options_.progress(report_.bytes);
                return written;
            });
        TRY_VOID(std::move(written));
        if (read && done < info.size) read = fail(Errc::corrupt, "", "the contents are shorter than the size says");
        if (read) return {};
        if (!options_.failed) return std::unexpected(std::move(read).error().in(printable(shown, 256)));
        note(shown, read.error());
        return {};
    }

    Result<void> add(std::span<const std::byte> bytes) {
        while (!bytes.empty()) {
            const auto written = archive_write_data(archive_.get(), bytes.data(), bytes.size());
            if (written < 0) return failed();
            if (written == 0) return fail(Errc::corrupt, "", "the contents are longer than the size says");
            bytes = bytes.subspan(static_cast<std::size_t>(written));
        }
        return {};
    }

    FileSystem& files_;
    const ExtractOptions& options_;
    int descriptor_;
    std::unique_ptr<archive, CloseWriter> archive_;
    std::unique_ptr<archive_entry, FreeEntry> entry_;
    std::map<Inode, std::string> made_;  // files with several names, by the first path
    ExtractReport report_;
};

}  // namespace

Result<ExtractReport> write_tar(FileSystem& files, const std::vector<ExtractItem>& items, int descriptor,
                                const ExtractOptions& options) {
    return within_memory([&] { return TarWriter(files, options, descriptor).run(items); });
}

}  // namespace qcow
