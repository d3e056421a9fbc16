// The file system of an image as a tree.

#include <sys/stat.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>

#include "build/tree.h"
#include "qcow/filesystem.h"
#include "qcow/text.h"

namespace qcow {
namespace {

/// A file system that several threads read from.
struct SharedFiles {
    std::shared_ptr<Disk> disk;
    std::unique_ptr<FileSystem> files;
    std::mutex mutex;  // guards `files`
};

class FileInImage final : public Contents {
public:
    FileInImage(SharedFiles& shared, Inode inode) : shared_(shared), inode_(inode) {}

    Result<void> read(std::uint64_t at, std::span<std::byte> to) const override {
        std::unique_lock lock(shared_.mutex);
        auto extents = shared_.files->extents(inode_, at);
        if (!extents && extents.error().code != Errc::unsupported) return std::unexpected(std::move(extents).error());
        if (!extents) return read_by_file_system(at, to);
        lock.unlock();
        const auto end = at + to.size();
        auto done = at;
        for (const auto& extent : *extents) {
            const auto begin = std::max(extent.at, at);
            const auto last = std::min(extent.at + extent.length, end);
            if (begin >= last) continue;
            const auto piece = to.subspan(begin - at, last - begin);
            if (extent.stored) {
                TRY_VOID(shared_.disk->read(*extent.stored + (begin - extent.at), piece));
            } else {
                std::ranges::fill(piece, std::byte{0});
            }
            done = last;
        }
        if (done == end) return {};
        // There are more extents than one list has.
        return done == at ? ended() : read(done, to.subspan(done - at));
    }

private:
    Result<void> read_by_file_system(std::uint64_t at, std::span<std::byte> to) const {
        while (!to.empty()) {
            const auto got = TRY(shared_.files->read(inode_, at, to));
            if (got == 0) return ended();
            at += got;
            to = to.subspan(got);
        }
        return {};
    }

    static std::unexpected<Error> ended() {
        return fail(Errc::corrupt, "source", "a file of the image is shorter than its inode says");
    }

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

Result<Tree> tree_of_disk(std::shared_ptr<Disk> disk) {
    auto shared = std::make_shared<SharedFiles>();
    shared->disk = disk;
    shared->files = TRY(open_file_system(std::move(disk)));
    return ImageLister(std::move(shared)).run();
}

}  // namespace qcow
