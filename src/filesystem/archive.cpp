// ISO 9660 with Rock Ridge or Joliet, tar, cpio, zip and 7z, by libarchive. What they have in common: a list of files,
// read from front to back.

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "base/bits.h"
#include "base/try.h"
#include "filesystem/archive_entry.h"
#include "filesystem/readers.h"
#include "qcow/text.h"

namespace qcow {
namespace {

constexpr std::size_t most_nodes = 1'000'000;
constexpr Inode archive_root = 1;

struct Close {
    void operator()(archive* open) const { archive_read_free(open); }
};

/// An archive that is being read from front to back.
class Stream {
public:
    /// With `unicode`, the archive says which characters its names have; else they are bytes.
    Stream(Disk& disk, bool unicode) : disk_(disk), unicode_(unicode), buffer_(1 * MiB) {}

    Result<void> open() {
        const Utf8Locale locale(unicode_);
        archive_.reset(archive_read_new());
        if (!archive_) return fail(Errc::no_memory, "", "out of memory");
        auto* const it = archive_.get();
        archive_read_support_format_tar(it);
        archive_read_support_format_cpio(it);
        archive_read_support_format_zip(it);
        archive_read_support_format_7zip(it);
        archive_read_support_format_iso9660(it);
        archive_read_set_read_callback(it, read);
        archive_read_set_seek_callback(it, seek);
        archive_read_set_skip_callback(it, skip);
        archive_read_set_callback_data(it, this);
        return verify(archive_read_open1(it));
    }

    /// Returns the next entry; null: the end.
    Result<archive_entry*> next() {
        const Utf8Locale locale(unicode_);
        archive_entry* entry = nullptr;
        const int code = archive_read_next_header(archive_.get(), &entry);
        if (code == ARCHIVE_EOF) return nullptr;
        TRY_VOID(verify(code));
        return entry;
    }

    [[nodiscard]] archive* reader() const { return archive_.get(); }

    Result<std::size_t> contents(std::span<std::byte> to) {
        const auto done = archive_read_data(archive_.get(), to.data(), to.size());
        if (done < 0) TRY_VOID(verify(static_cast<int>(done)));
        return static_cast<std::size_t>(std::max<la_ssize_t>(done, 0));
    }

private:
    static la_ssize_t read(archive* it, void* data, const void** to) {
        auto& self = *static_cast<Stream*>(data);
        const auto part = std::min<std::uint64_t>(self.buffer_.size(), self.disk_.size() - self.at_);
        if (part == 0) return 0;
        if (auto done = self.disk_.read({self.at_}, std::span(self.buffer_).first(part)); !done) {
            if (!self.error_) self.error_ = std::move(done).error();
            archive_set_error(it, EIO, "cannot read the disk");
            return ARCHIVE_FATAL;
        }
        self.at_ += part;
        *to = self.buffer_.data();
        return static_cast<la_ssize_t>(part);
    }
    static la_int64_t skip(archive*, void* data, la_int64_t bytes) {
        auto& self = *static_cast<Stream*>(data);
        const auto part =
            std::min(static_cast<std::uint64_t>(std::max<la_int64_t>(bytes, 0)), self.disk_.size() - self.at_);
        self.at_ += part;
        return static_cast<la_int64_t>(part);
    }
    static la_int64_t seek(archive*, void* data, la_int64_t offset, int whence) {
        auto& self = *static_cast<Stream*>(data);
        const auto size = static_cast<la_int64_t>(self.disk_.size());
        const la_int64_t base = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? static_cast<la_int64_t>(self.at_) : size;
        la_int64_t to = 0;
        if (__builtin_add_overflow(base, offset, &to) || to < 0 || to > size) return ARCHIVE_FATAL;
        self.at_ = static_cast<std::uint64_t>(to);
        return to;
    }

    Result<void> verify(int code) {
        if (error_) return std::unexpected(*std::exchange(error_, std::nullopt));
        if (code >= ARCHIVE_WARN) return {};
        const auto* const text = archive_error_string(archive_.get());
        return fail(Errc::corrupt, "archive", text == nullptr ? "it is damaged" : printable(text, 300));
    }

    Disk& disk_;
    bool unicode_;
    std::vector<std::byte> buffer_;
    std::uint64_t at_ = 0;
    std::optional<Error> error_;
    std::unique_ptr<archive, Close> archive_;
};

struct Node {
    FileInfo info;
    std::string link;
    std::vector<Attribute> attributes;
    std::map<std::string, Inode, std::less<>> children;
    std::size_t position = 0;  // which entry of the archive has the contents, from 1; 0: none
};

class ArchiveFileSystem final : public FileSystem {
public:
    explicit ArchiveFileSystem(std::shared_ptr<Disk> disk) : disk_(std::move(disk)) {}

    /// Reads all headers, and builds the tree.
    Result<void> open(const Content& content) {
        content_ = content;
        add_directory();
        Stream stream(*disk_, unicode());
        TRY_VOID(stream.open());
        for (std::size_t position = 1;; ++position) {
            const auto next = stream.next();
            if (!next && position == 1) return std::unexpected(next.error());
            // What comes before the damage can be read.
            if (!next) damage_ = next.error();
            auto* const entry = next.value_or(nullptr);
            if (entry == nullptr) return {};
            if (nodes_.size() >= most_nodes || position > most_nodes)
                return fail(Errc::limit_exceeded, "archive", fmt::format("it has more than {} files", most_nodes));
            TRY_VOID(take(stream.reader(), entry, position));
        }
    }

    [[nodiscard]] Inode root() const override { return archive_root; }

protected:
    Result<FileSystemInfo> do_info() override {
        FileSystemInfo info;
        info.type = content_.type;
        info.label = content_.label;
        info.uuid = content_.uuid;
        info.block_bytes = content_.type == "iso9660" ? 2048 : 512;
        info.bytes = disk_->size();
        info.free_bytes = 0;
        if (refused_ > 0) {
            info.warnings.push_back(
                fmt::format("{} entries are left out: their names or hard links lead out of the archive", refused_));
        }
        if (nameless_acls_ > 0) {
            info.warnings.push_back(fmt::format(
                "the ACLs of {} files are left out: they name users without numbers; archive with tar --numeric-owner",
                nameless_acls_));
        }
        return info;
    }

    Result<FileInfo> do_stat(Inode inode) override { return TRY(node(inode))->info; }

    Result<std::vector<DirectoryEntry>> do_list(Inode directory, bool, std::vector<Error>& refused) override {
        const auto& it = *TRY(node(directory));
        if (it.info.type != FileType::directory)
            return fail(Errc::invalid_argument, fmt::format("file {}", directory), "this is no directory");
        std::vector<DirectoryEntry> entries;
        entries.reserve(it.children.size());
        if (directory == archive_root && damage_) refused.push_back(*damage_);
        for (const auto& [name, child] : it.children)
            entries.push_back({name, child, nodes_[child - 1].info.type, false});
        return entries;
    }

    Result<std::size_t> do_read(Inode inode, std::uint64_t at, std::span<std::byte> to) override {
        const auto& it = *TRY(node(inode));
        if (it.position == 0) return 0;
        if (!stream_ || position_ > it.position || (position_ == it.position && read_ > at)) {
            stream_.emplace(*disk_, unicode());
            position_ = 0;
            TRY_VOID(stream_->open());
        }
        while (position_ < it.position) {
            if (TRY(stream_->next()) == nullptr) return fail(Errc::corrupt, "archive", "it is shorter than before");
            ++position_;
            read_ = 0;
        }
        std::vector<std::byte> skipped;
        while (read_ < at) {
            skipped.resize(std::min<std::uint64_t>(1 * MiB, at - read_));
            const auto got = TRY(stream_->contents(skipped));
            if (got == 0) return 0;
            read_ += got;
        }
        std::size_t done = 0;
        while (done < to.size()) {
            const auto got = TRY(stream_->contents(to.subspan(done)));
            if (got == 0) break;
            done += got;
            read_ += got;
        }
        return done;
    }

    Result<std::string> do_read_link(Inode inode) override {
        const auto& it = *TRY(node(inode));
        if (it.info.type != FileType::symbolic_link)
            return fail(Errc::invalid_argument, fmt::format("file {}", inode), "this is no symbolic link");
        return it.link;
    }

    Result<std::vector<Attribute>> do_attributes(Inode inode) override { return TRY(node(inode))->attributes; }

private:
    [[nodiscard]] bool unicode() const { return content_.type != "tar" && content_.type != "cpio"; }

    Result<Node*> node(Inode inode) {
        if (inode == 0 || inode > nodes_.size())
            return fail(Errc::not_found, fmt::format("file {}", inode), "the archive has no such file");
        return &nodes_[inode - 1];
    }

    Inode add_directory() {
        nodes_.emplace_back();
        nodes_.back().info.inode = nodes_.size();
        nodes_.back().info.type = FileType::directory;
        nodes_.back().info.mode = 0755;
        return nodes_.size();
    }

    /// The names of a path; none if one of them leads upwards.
    static std::optional<std::vector<std::string>> names_of(std::string_view path) {
        std::vector<std::string> names;
        while (!path.empty()) {
            const auto end = std::min(path.find('/'), path.size());
            const auto name = path.substr(0, end);
            path.remove_prefix(std::min(end + 1, path.size()));
            if (name.empty() || name == ".") continue;
            if (!is_entry_name(name)) return {};
            names.emplace_back(name);
        }
        return names;
    }

    Result<void> take(archive* reader, archive_entry* entry, std::size_t position) {
        const auto path = path_of_entry(entry);
        const auto names = names_of(path);
        constexpr std::size_t deepest = 4096;
        if (path.empty() || !names || names->size() > deepest) {
            ++refused_;
            return {};
        }
        Inode above = archive_root;
        for (std::size_t i = 0; i + 1 < names->size(); ++i) {
            auto& children = nodes_[above - 1].children;
            auto found = children.find((*names)[i]);
            if (found == children.end() || nodes_[found->second - 1].info.type != FileType::directory) {
                const auto made = add_directory();  // moves the nodes
                nodes_[above - 1].children.insert_or_assign((*names)[i], made);
                above = made;
            } else {
                above = found->second;
            }
        }
        if (const auto target = hard_link_of_entry(entry); !target.empty()) {
            const auto there = names_of(target);
            const auto inode = there ? find(*there) : std::nullopt;
            if (!inode || names->empty() || nodes_[*inode - 1].info.type == FileType::directory) {
                ++refused_;
                return {};
            }
            auto& node = nodes_[*inode - 1];
            ++node.info.links;
            // In cpio, the last name of a file comes with its contents.
            if (node.info.type == FileType::regular && archive_entry_size(entry) > 0) {
                node.info.size = static_cast<std::uint64_t>(archive_entry_size(entry));
                node.position = position;
            }
            nodes_[above - 1].children.insert_or_assign(names->back(), *inode);
            return {};
        }
        Inode inode = archive_root;
        if (!names->empty()) {
            const auto& children = nodes_[above - 1].children;
            const auto found = children.find(names->back());
            const bool again = found != children.end() && archive_entry_filetype(entry) == AE_IFDIR &&
                               nodes_[found->second - 1].info.type == FileType::directory;
            inode = again ? found->second : add_directory();
            nodes_[above - 1].children.insert_or_assign(names->back(), inode);
        }
        fill(nodes_[inode - 1], reader, entry);
        if (nodes_[inode - 1].info.type == FileType::regular) nodes_[inode - 1].position = position;
        return {};
    }

    std::optional<Inode> find(const std::vector<std::string>& names) const {
        Inode here = archive_root;
        for (const auto& name : names) {
            const auto& children = nodes_[here - 1].children;
            const auto found = children.find(name);
            if (found == children.end()) return {};
            here = found->second;
        }
        return here;
    }

    void fill(Node& node, archive* reader, archive_entry* entry) {
        auto& info = node.info;
        info.type = type_of_mode(archive_entry_filetype(entry));
        info.mode = mode_of_entry(entry) & 07777U;
        info.user = static_cast<std::uint32_t>(archive_entry_uid(entry));
        info.group = static_cast<std::uint32_t>(archive_entry_gid(entry));
        info.size = static_cast<std::uint64_t>(std::max<la_int64_t>(archive_entry_size(entry), 0));
        const auto device = device_of_entry(entry);
        info.major = device.major;
        info.minor = device.minor;
        info.modified = mtime_of_entry(reader, entry);
        info.accessed = atime_of_entry(reader, entry);
        if (info.type == FileType::symbolic_link) {
            node.link = target_of_entry(entry).substr(0, longest_link);
            info.size = node.link.size();
        }
        archive_entry_xattr_reset(entry);
        const char* name = nullptr;
        const void* value = nullptr;
        std::size_t length = 0;
        while (archive_entry_xattr_next(entry, &name, &value, &length) == ARCHIVE_OK) {
            if (name == nullptr) continue;
            const auto* const bytes = static_cast<const std::byte*>(value);
            node.attributes.push_back({name, {bytes, bytes + std::min(length, longest_attribute)}});
        }
        auto acls = acls_of_entry(entry);
        if (!acls) ++nameless_acls_;
        if (acls) std::ranges::move(*acls, std::back_inserter(node.attributes));
    }

    std::shared_ptr<Disk> disk_;
    Content content_;
    std::vector<Node> nodes_;  // by inode, from 1
    std::size_t refused_ = 0;
    std::size_t nameless_acls_ = 0;  // that name users without numbers
    std::optional<Error> damage_;    // at which reading the headers ended

    std::optional<Stream> stream_;  // for contents
    std::size_t position_ = 0;      // the entry that it is at
    std::uint64_t read_ = 0;        // bytes of its contents that were read
};

}  // namespace

Result<std::unique_ptr<FileSystem>> open_archive(std::shared_ptr<Disk> disk, const Content& content) {
    auto files = std::make_unique<ArchiveFileSystem>(std::move(disk));
    TRY_VOID(files->open(content));
    return files;
}

}  // namespace qcow
