// Tar archives as trees.

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <memory>

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

/// A file whose contents are in the temporary file.
class ArchivedFile final : public Contents {
public:
    struct Piece {
        DataRun run;
        std::uint64_t at = 0;  // in the temporary file
    };

    ArchivedFile(std::shared_ptr<const ScratchFile> scratch, std::vector<Piece> pieces)
        : scratch_(std::move(scratch)), pieces_(std::move(pieces)) {}

    Result<void> read(std::uint64_t at, std::span<std::byte> to) const override {
        std::ranges::fill(to, std::byte{0});
        for (const auto& [run, where] : pieces_) {
            const auto begin = std::max(run.start, at);
            const auto end = std::min(run.start + run.length, at + to.size());
            if (begin < end) TRY_VOID(scratch_->read(where + (begin - run.start), to.subspan(begin - at, end - begin)));
        }
        return {};
    }

private:
    std::shared_ptr<const ScratchFile> scratch_;
    std::vector<Piece> pieces_;
};

class Reader {
public:
    explicit Reader(const std::string& path) : path_(path), archive_(archive_read_new()) {}

    Result<Tree> run() {
        if (!archive_) return fail(Errc::no_memory, "", "out of memory");
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
        auto inode = std::make_shared<TreeInode>();
        if (auto filled = fill(*inode, entry); !filled) {
            return std::unexpected(
                std::move(filled).error().in(fmt::format("{}: {}", printable(path_), printable(path))));
        }
        const auto type = archive_entry_filetype(entry);
        if (type == AE_IFREG && archive_entry_size(entry) > 0) TRY_VOID(read_contents(*inode));
        if (is_root) {
            if (type != AE_IFDIR) return {};
            tree_.root().inode = std::move(inode);
            tree_.root().implied = false;
            return {};
        }
        auto& node = *TRY(tree_.place(path));
        node.inode = std::move(inode);
        node.implied = false;
        if (type != AE_IFDIR) {
            node.children.reset();
        } else if (!node.children) {
            node.children = std::make_unique<Children>();
        }
        return {};
    }

    Result<void> link(const std::string& path, const std::string& target) {
        const auto* there = tree_.find(target);
        if (there == nullptr || there->is_directory()) {
            return fail(Errc::corrupt, printable(path_),
                        fmt::format("{} is a hard link to {}, which the archive does not have before it",
                                    printable(path, 200), printable(target, 200)));
        }
        auto inode = there->inode;
        auto& node = *TRY(tree_.place(path));
        node.children.reset();
        node.inode = std::move(inode);
        return {};
    }

    Result<void> fill(TreeInode& inode, archive_entry* entry) {
        constexpr std::int64_t most_id = 0xfffffffe;
        if (archive_entry_uid(entry) > most_id || archive_entry_gid(entry) > most_id)
            return fail(Errc::invalid_argument, "", "the number of its owner is larger than 4294967294");
        inode.mode = mode_of_entry(entry);
        inode.uid = static_cast<std::uint32_t>(archive_entry_uid(entry));
        inode.gid = static_cast<std::uint32_t>(archive_entry_gid(entry));
        if (const auto time = mtime_of_entry(archive_.get(), entry)) {
            inode.mtime = time->seconds;
            inode.nanoseconds = time->nanoseconds;
        }
        if (S_ISLNK(inode.mode)) inode.make_rare().target = target_of_entry(entry);
        if (S_ISCHR(inode.mode) || S_ISBLK(inode.mode)) {
            inode.make_rare().major = static_cast<unsigned>(archive_entry_rdevmajor(entry));
            inode.make_rare().minor = static_cast<unsigned>(archive_entry_rdevminor(entry));
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
        std::vector<ArchivedFile::Piece> pieces;
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
            const auto where = TRY(scratch_->append(std::span(static_cast<const std::byte*>(data), size)));
            stored += size;
            if (!pieces.empty() && pieces.back().run.start + pieces.back().run.length == start) {
                pieces.back().run.length += size;
            } else {
                pieces.push_back({{start, size}, where});
            }
        }
        if (!pieces.empty()) inode.size = std::max(inode.size, pieces.back().run.start + pieces.back().run.length);
        if (stored < inode.size) {
            auto& runs = inode.make_rare().runs.emplace();
            for (const auto& piece : pieces) runs.push_back(piece.run);
        }
        inode.content = std::make_unique<ArchivedFile>(scratch_, std::move(pieces));
        return {};
    }

    const std::string& path_;
    std::unique_ptr<archive, FreeArchive> archive_;
    std::shared_ptr<ScratchFile> scratch_ = std::make_shared<ScratchFile>();
    Tree tree_;
};

}  // namespace

Result<Tree> tree_of_archive(const std::string& path) { return Reader(path).run(); }

}  // namespace qcow
