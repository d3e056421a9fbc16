// The file system of an image as a tree.

#include <sys/stat.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "build/tree.h"
#include "qcow/filesystem.h"
#include "qcow/text.h"

namespace qcow {
namespace {

/// A file system that several threads read from.
class SharedFiles {
public:
    SharedFiles(std::shared_ptr<Disk> on, std::unique_ptr<FileSystem> opened)
        : disk(std::move(on)), files(std::move(opened)) {}

    /// Returns the extent of a file that has the byte `at`.
    Result<FileExtent> extent(Inode inode, std::uint64_t at) {
        const std::lock_guard lock(mutex_);
        const auto known = std::ranges::find_if(
            known_, [&](const Known& list) { return list.inode == inode && list.extent(at).has_value(); });
        if (known != known_.end()) {
            std::rotate(known_.begin(), known, known + 1);
        } else {
            auto extents = TRY(files->extents(inode, at));
            if (known_.size() == most_known) known_.pop_back();
            known_.push_front({inode, std::move(extents)});
        }
        if (const auto found = known_.front().extent(at)) return *found;
        return ended();
    }

    Result<void> read(Inode inode, std::uint64_t at, std::span<std::byte> to) {
        const std::lock_guard lock(mutex_);
        while (!to.empty()) {
            const auto got = TRY(files->read(inode, at, to));
            if (got == 0) return ended();
            at += got;
            to = to.subspan(got);
        }
        return {};
    }

    const std::shared_ptr<Disk> disk;
    const std::unique_ptr<FileSystem> files;  // used by one thread until the tree is complete

private:
    struct Known {
        Inode inode = 0;
        std::vector<FileExtent> extents;

        [[nodiscard]] std::optional<FileExtent> extent(std::uint64_t at) const {
            const auto next = std::ranges::upper_bound(extents, at, {}, &FileExtent::at);
            if (next == extents.begin() || at - std::prev(next)->at >= std::prev(next)->length) return std::nullopt;
            return *std::prev(next);
        }
    };

    static std::unexpected<Error> ended() {
        return fail(Errc::corrupt, "source", "a file of the image is shorter than its inode says");
    }

    /// Finding extents takes time that grows with their number, and a file is read piece by piece.
    static constexpr std::size_t most_known = 16;
    std::mutex mutex_;         // guards the file system and what follows
    std::deque<Known> known_;  // the last lists that were used, the latest first
};

class FileInImage final : public Contents {
public:
    FileInImage(SharedFiles& shared, Inode inode) : shared_(shared), inode_(inode) {}

    Result<void> read(std::uint64_t at, std::span<std::byte> to) const override {
        while (!to.empty()) {
            const auto extent = shared_.extent(inode_, at);
            if (!extent && extent.error().code == Errc::unsupported) return shared_.read(inode_, at, to);
            if (!extent) return std::unexpected(extent.error());
            const auto part = to.first(std::min<std::uint64_t>(to.size(), extent->at + extent->length - at));
            if (extent->stored) {
                TRY_VOID(shared_.disk->read(*extent->stored + (at - extent->at), part));
            } else {
                std::ranges::fill(part, std::byte{0});
            }
            at += part.size();
            to = to.subspan(part.size());
        }
        return {};
    }

private:
    SharedFiles& shared_;
    Inode inode_;
};

mode_t type_bits(FileType type) {
    switch (type) {
        case FileType::regular: return S_IFREG;
        case FileType::directory: return S_IFDIR;
        case FileType::symbolic_link: return S_IFLNK;
        case FileType::character_device: return S_IFCHR;
        case FileType::block_device: return S_IFBLK;
        case FileType::fifo: return S_IFIFO;
        case FileType::socket: return S_IFSOCK;
        case FileType::unknown: break;
    }
    return 0;
}

class ImageLister {
public:
    explicit ImageLister(std::shared_ptr<SharedFiles> shared) : shared_(std::move(shared)) {}

    Result<Tree> run() {
        auto& files = *shared_->files;
        tree_.keep(shared_);
        tree_.keep(contents_);
        TRY_VOID(walk(
            files, files.root(), {},
            [this](const Visited& visited) -> Result<Descend> {
                if (auto added = add(visited); !added)
                    return std::unexpected(std::move(added).error().in(printable(visited.path)));
                return Descend::yes;
            }));
        return std::move(tree_);
    }

private:
    Result<void> add(const Visited& visited) {
        const auto& info = visited.info;
        if (type_bits(info.type) == 0) return fail(Errc::unsupported, "", "the type of the file is not known");
        auto& place = *TRY(tree_.place(visited.path));
        if (place != nullptr && !visited.path.empty())
            return fail(Errc::corrupt, "", "its directory has two files with this name; check the source");
        if (info.type == FileType::directory || info.links <= 1) {
            place = TRY(inode_of(info));
            return {};
        }
        auto& known = linked_[info.inode];
        if (known == nullptr) known = TRY(inode_of(info));
        place = known;
        return {};
    }

    Result<TreeInode*> inode_of(const FileInfo& info) {
        auto& files = *shared_->files;
        auto* inode = &tree_.new_inode(type_bits(info.type) | (info.mode & 07777));
        inode->uid = info.user;
        inode->gid = info.group;
        if (info.modified) {
            inode->mtime = info.modified->seconds;
            inode->nanoseconds = info.modified->nanoseconds;
        }
        if (info.type == FileType::symbolic_link) inode->make_rare().target = TRY(files.read_link(info.inode));
        if (info.type == FileType::character_device || info.type == FileType::block_device) {
            inode->make_rare().major = info.major;
            inode->make_rare().minor = info.minor;
        }
        auto attributes = files.attributes(info.inode);
        if (!attributes && attributes.error().code != Errc::unsupported)
            return std::unexpected(std::move(attributes).error());
        if (attributes) {
            for (const auto& [name, value] : *attributes) {
                inode->make_rare().xattrs.emplace_back(
                    name, std::string(reinterpret_cast<const char*>(value.data()), value.size()));
            }
            if (inode->rare) std::ranges::sort(inode->rare->xattrs);
        }
        if (info.type != FileType::regular || info.size == 0) return inode;
        inode->size = info.size;
        inode->content = &contents_->emplace_back(*shared_, info.inode);
        if (info.stored_bytes < info.size) TRY_VOID(find_runs(*inode, info));
        return inode;
    }

    /// The runs of a file that may have holes.
    Result<void> find_runs(TreeInode& inode, const FileInfo& info) {
        std::vector<DataRun> runs;
        for (std::uint64_t at = 0; at < info.size;) {
            const auto extents = shared_->files->extents(info.inode, at);
            if (!extents && extents.error().code == Errc::unsupported) return {};
            if (!extents) return std::unexpected(extents.error());
            if (extents->empty()) break;
            for (const auto& extent : *extents) {
                at = extent.at + extent.length;
                if (extent.stored) runs.push_back({extent.at, std::min(at, info.size) - extent.at});
            }
        }
        inode.make_rare().runs = std::move(runs);
        return {};
    }

    std::shared_ptr<SharedFiles> shared_;
    std::shared_ptr<std::deque<FileInImage>> contents_ = std::make_shared<std::deque<FileInImage>>();
    std::map<Inode, TreeInode*> linked_;
    Tree tree_;
};

}  // namespace

Result<Tree> tree_of_files(std::shared_ptr<Disk> disk, std::unique_ptr<FileSystem> files) {
    auto shared = std::make_shared<SharedFiles>(std::move(disk), std::move(files));
    return ImageLister(std::move(shared)).run();
}

}  // namespace qcow
