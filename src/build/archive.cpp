// Tar archives as trees.

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <deque>
#include <memory>
#include <ranges>
#include <utility>

#include "base/bits.h"
#include "build/scratch.h"
#include "build/tree.h"
#include "filesystem/archive_entry.h"
#include "qcow/text.h"

namespace qcow {
namespace {

/// More than any archive that people make, and little enough for memory.
constexpr std::uint64_t most_entries = 20'000'000;

struct FreeArchive {
    void operator()(archive* reader) const { archive_read_free(reader); }
};

/// A part of a file, which lies in the temporary file.
struct ArchivedPiece {
    DataRun run;
    std::uint64_t at = 0;  // in the temporary file
};

/// What the files of an archive hold.
struct ArchivedData {
    ScratchFile scratch;
    std::deque<ArchivedPiece> pieces;  // of one file after the other
};

/// A file of an archive. There may be millions, so it is small.
class ArchivedFile final : public Contents {
public:
    /// It has the pieces from `first` on, up to those that there are.
    ArchivedFile(const ArchivedData& data, std::size_t first)
        : data_(data), first_(first), count_(data.pieces.size() - first) {}

    [[nodiscard]] auto pieces() const {
        const auto begin = data_.pieces.begin() + static_cast<std::ptrdiff_t>(first_);
        return std::ranges::subrange(begin, begin + static_cast<std::ptrdiff_t>(count_));
    }

    Result<void> read(std::uint64_t at, std::span<std::byte> to) const override {
        std::ranges::fill(to, std::byte{0});
        for (const auto& [run, where] : pieces()) {
            const auto begin = std::max(run.start, at);
            const auto end = std::min(run.start + run.length, at + to.size());
            if (begin < end)
                TRY_VOID(data_.scratch.read(where + (begin - run.start), to.subspan(begin - at, end - begin)));
        }
        return {};
    }

private:
    const ArchivedData& data_;
    std::size_t first_;
    std::size_t count_;
};

class Reader {
public:
    explicit Reader(const std::string& path) : path_(path), archive_(archive_read_new()) {}

    Result<Tree> run() {
        if (!archive_) return fail(Errc::no_memory, "", "out of memory");
        tree_.keep(data_);
        tree_.keep(files_);
        auto* reader = archive_.get();
        archive_read_support_format_tar(reader);
        archive_read_support_filter_gzip(reader);
        archive_read_support_filter_bzip2(reader);
        archive_read_support_filter_xz(reader);
        archive_read_support_filter_zstd(reader);
        if (archive_read_open_filename(reader, path_.c_str(), 1 << 20) != ARCHIVE_OK) return broken();
        for (std::uint64_t entries = 0;; ++entries) {
            archive_entry* entry = nullptr;
            const int status = archive_read_next_header(reader, &entry);
            if (status == ARCHIVE_EOF) break;
            if (status < ARCHIVE_WARN) return broken();
            if (entries == most_entries) return fail(Errc::limit_exceeded, path_, "the archive has too many entries");
            TRY_VOID(add(entry));
        }
        return std::move(tree_);
    }

private:
    [[nodiscard]] std::unexpected<Error> broken() const {
        const auto* text = archive_error_string(archive_.get());
        const auto code = archive_errno(archive_.get());
        if (code == ENOENT || code == EACCES) {
            return fail(code == ENOENT ? Errc::not_found : Errc::access_denied, printable(path_),
                        text == nullptr ? "cannot open" : printable(text, 200));
        }
        return fail(Errc::corrupt, printable(path_),
                    fmt::format("is no tar archive, or a damaged one: {}",
                                text == nullptr ? "unknown error" : printable(text, 200)));
    }

    /// A path in the archive. An absolute one would be meant for another place.
    Result<std::string> checked(std::string path) const {
        if (path.starts_with('/')) {
            return fail(Errc::refused_by_policy, printable(path_),
                        fmt::format("an entry has the absolute path {}; archive the files with relative paths",
                                    printable(path, 200)));
        }
        if (auto parts = parts_of_path(path); !parts) return std::unexpected(std::move(parts).error().in(path_));
        return path;
    }

    Result<void> add(archive_entry* entry) {
        const auto path = TRY(checked(path_of_entry(entry)));
        const bool is_root = TRY(parts_of_path(path)).empty();
        auto hardlink = hard_link_of_entry(entry);
        if (!hardlink.empty() && !is_root) return link(path, TRY(checked(std::move(hardlink))));
        auto& inode = tree_.new_inode(mode_of_entry(entry));
        if (auto filled = fill(inode, entry); !filled) {
            return std::unexpected(
                std::move(filled).error().in(fmt::format("{}: {}", printable(path_), printable(path))));
        }
        if (S_ISREG(inode.mode) && archive_entry_size(entry) > 0) TRY_VOID(read_contents(inode));
        if (is_root && !inode.is_directory())
            return fail(Errc::corrupt, printable(path_), "an entry that is no directory has no name");
        auto& place = *TRY(tree_.place(path));
        // A directory may come behind what is in it.
        if (place != nullptr && place->is_directory() && inode.is_directory()) {
            std::swap(inode.children, place->children);
            inode.children->implied = false;
        }
        place = &inode;
        return {};
    }

    Result<void> link(const std::string& path, const std::string& target) {
        auto* there = tree_.find(target);
        if (there == nullptr || there->is_directory()) {
            return fail(Errc::corrupt, printable(path_),
                        fmt::format("{} is a hard link to {}, which the archive does not have before it",
                                    printable(path, 200), printable(target, 200)));
        }
        *TRY(tree_.place(path)) = there;
        return {};
    }

    Result<void> fill(TreeInode& inode, archive_entry* entry) {
        constexpr std::int64_t most_id = 0xfffffffe;
        if (archive_entry_uid(entry) > most_id || archive_entry_gid(entry) > most_id)
            return fail(Errc::invalid_argument, "", "the number of its owner is larger than 4294967294");
        inode.uid = static_cast<std::uint32_t>(archive_entry_uid(entry));
        inode.gid = static_cast<std::uint32_t>(archive_entry_gid(entry));
        if (const auto time = mtime_of_entry(archive_.get(), entry)) {
            inode.mtime = time->seconds;
            inode.nanoseconds = time->nanoseconds;
        }
        if (S_ISLNK(inode.mode)) inode.make_rare().target = target_of_entry(entry);
        if (S_ISCHR(inode.mode) || S_ISBLK(inode.mode)) {
            const auto device = device_of_entry(entry);
            inode.make_rare().major = device.major;
            inode.make_rare().minor = device.minor;
        }
        const char* name = nullptr;
        const void* value = nullptr;
        std::size_t size = 0;
        archive_entry_xattr_reset(entry);
        while (archive_entry_xattr_next(entry, &name, &value, &size) == ARCHIVE_OK) {
            inode.make_rare().xattrs.emplace_back(name, std::string(static_cast<const char*>(value), size));
        }
        for (const auto& [acl, bytes] : TRY(acls_of_entry(entry))) {
            inode.make_rare().xattrs.emplace_back(
                acl, std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
        }
        if (inode.rare) std::ranges::sort(inode.rare->xattrs);
        return {};
    }

    Result<void> read_contents(TreeInode& inode) {
        auto& pieces = data_->pieces;
        const auto first = pieces.size();
        std::uint64_t stored = 0;
        for (;;) {
            const void* data = nullptr;
            std::size_t size = 0;
            la_int64_t at = 0;
            const int status = archive_read_data_block(archive_.get(), &data, &size, &at);
            if (status == ARCHIVE_EOF) {
                inode.size = static_cast<std::uint64_t>(at);
                break;
            }
            if (status < ARCHIVE_WARN) return broken();
            if (size == 0) continue;
            const auto start = static_cast<std::uint64_t>(at);
            const auto where = TRY(data_->scratch.append(std::span(static_cast<const std::byte*>(data), size)));
            stored += size;
            if (pieces.size() > first && pieces.back().run.start + pieces.back().run.length == start) {
                pieces.back().run.length += size;
            } else {
                pieces.push_back({{start, size}, where});
            }
        }
        const auto& content = files_->emplace_back(*data_, first);
        if (pieces.size() > first)
            inode.size = std::max(inode.size, pieces.back().run.start + pieces.back().run.length);
        if (stored < inode.size) {
            auto& runs = inode.make_rare().runs.emplace();
            for (const auto& piece : content.pieces()) runs.push_back(piece.run);
        }
        inode.content = &content;
        return {};
    }

    const std::string& path_;
    std::unique_ptr<archive, FreeArchive> archive_;
    std::shared_ptr<ArchivedData> data_ = std::make_shared<ArchivedData>();
    std::shared_ptr<std::deque<ArchivedFile>> files_ = std::make_shared<std::deque<ArchivedFile>>();
    Tree tree_;
};

}  // namespace

Result<Tree> tree_of_archive(const std::string& path) { return Reader(path).run(); }

}  // namespace qcow
