// FAT12, FAT16 and FAT32, changed in place.
//
// A cut at any time leaves at most clusters that belong to no file. So the order is: contents, which go to clusters
// that were free; links to these; directories; and only then, clusters become free. What was not written stays in
// memory.

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <utility>

#include "base/bits.h"
#include "filesystem/fat_directory.h"
#include "filesystem/fat_table.h"
#include "filesystem/file_runs.h"
#include "filesystem/little_endian.h"
#include "filesystem/readers.h"
#include "qcow/text.h"

namespace qcow {
namespace {

constexpr Inode fat_root = 2;
constexpr Inode first_inode = 3;  // of the entry at the first byte of the root of FAT12 and FAT16, as The Sleuth Kit
constexpr std::uint64_t most_kept_bytes = 64 * MiB;  // of directories in memory

// What an entry says of a file.
std::uint32_t cluster_of(std::span<const std::byte> entry) {
    return std::uint32_t{load_le<std::uint16_t>(entry, 20)} << 16 | load_le<std::uint16_t>(entry, 26);
}
void store_cluster(std::span<std::byte> entry, std::uint32_t cluster) {
    store_le(entry, 20, static_cast<std::uint16_t>(cluster >> 16));
    store_le(entry, 26, static_cast<std::uint16_t>(cluster));
}
std::uint32_t size_of(std::span<const std::byte> entry) { return load_le<std::uint32_t>(entry, 28); }
void store_size(std::span<std::byte> entry, std::uint64_t size) {
    store_le(entry, 28, static_cast<std::uint32_t>(size));
}
FileType type_of(std::span<const std::byte> entry) {
    return (std::to_integer<unsigned>(entry[11]) & fat::is_directory) != 0 ? FileType::directory : FileType::regular;
}

class FatFileSystem final : public FileSystem {
public:
    FatFileSystem(std::shared_ptr<Disk> disk, const FatVolume& volume, Content content)
        : disk_(std::move(disk)), volume_(volume), content_(std::move(content)), table_(*disk_, volume_) {}

    Result<void> open() { return table_.begin(); }

    [[nodiscard]] Inode root() const override { return fat_root; }

protected:
    Result<FileSystemInfo> do_info() override {
        FileSystemInfo info;
        info.type = content_.type;
        info.label = content_.label;
        info.uuid = content_.uuid;
        info.block_bytes = layout().cluster_bytes();
        info.bytes = layout().sectors * layout().sector;
        if (const auto free = table_.free_clusters()) info.free_bytes = *free * layout().cluster_bytes();
        return info;
    }

    Result<FileInfo> do_stat(Inode inode) override {
        FileInfo info;
        info.inode = inode;
        info.type = FileType::directory;
        info.mode = 0777;
        if (inode == fat_root) return info;
        const auto entry = TRY(entry_of(inode));
        info.type = type_of(entry);
        info.size = size_of(entry);
        if (const auto time = fat::seconds_of({load_le<std::uint16_t>(entry, 24), load_le<std::uint16_t>(entry, 22)}))
            info.modified = Timestamp{*time, 0};
        return info;
    }

    Result<std::vector<DirectoryEntry>> do_list(Inode inode, bool, std::vector<Error>&) override {
        TRY_VOID(forget_directories());
        const auto& directory = *TRY(directory_of(inode));
        std::vector<DirectoryEntry> entries;
        for (const auto& [key, file] : directory.list.files())
            entries.push_back({file.name, inode_at(directory, file.slot), type_of(directory.list.entry(file.slot))});
        return entries;
    }

    Result<DirectoryEntry> do_lookup(Inode inode, const std::string& name) override {
        const auto& directory = *TRY(directory_of(inode));
        const auto& file = *TRY(find(directory, name));
        return DirectoryEntry{file.name, inode_at(directory, file.slot), type_of(directory.list.entry(file.slot))};
    }

    Result<std::size_t> do_read(Inode inode, std::uint64_t at, std::span<std::byte> to) override {
        std::size_t done = 0;
        for (const auto& extent : TRY(do_extents(inode, at))) {
            const auto part = to.subspan(done, std::min<std::uint64_t>(extent.length, to.size() - done));
            TRY_VOID(disk_->read(*extent.stored, part));
            done += part.size();
        }
        return done;
    }

    Result<std::vector<FileExtent>> do_extents(Inode inode, std::uint64_t at) override {
        const auto& file = *TRY(file_of(inode));
        const std::uint64_t size = size_of(TRY(entry_of(inode)));
        if (size > file.chain.size() * layout().cluster_bytes())
            return fail(Errc::corrupt, inode_place(inode), "its clusters end before its size does");
        FileRuns runs(at, size);
        for (std::uint64_t i = 0; i < file.chain.size() && !runs.full(); ++i)
            runs.add(i * layout().cluster_bytes(), layout().cluster_bytes(), GuestOffset{layout().at(file.chain[i])});
        return std::move(runs).finished();
    }

    // ---- Changes ----

    Result<Inode> do_create(Inode above, const std::string& name, const NewNode& node) override {
        TRY_VOID(forget_directories());
        auto& directory = *TRY(directory_of(above));
        const bool is_directory = node.info.type == FileType::directory;
        if (!is_directory && node.info.type != FileType::regular)
            return fail(Errc::invalid_argument, printable(name, 64), "FAT holds only regular files and directories");
        if (!node.attributes.empty())
            return fail(Errc::unsupported, printable(name, 64), "FAT has no extended attributes");
        if (const auto flaw = fat::flaw_of(name); !flaw.empty())
            return fail(Errc::invalid_argument, printable(name, 64), flaw);
        if (directory.list.find(name) != nullptr)
            return fail(Errc::invalid_argument, printable(name, 64), "something with this name exists");
        const auto at = TRY(room_in(directory, name));
        const auto time = node.info.modified.value_or(Timestamp{}).seconds;
        std::uint32_t cluster = 0;
        if (is_directory) cluster = TRY(new_directory(directory.first, time));
        const auto& file =
            directory.list.add(at, name, is_directory ? fat::is_directory : fat::is_archive, cluster, time, written_);
        changed_ = true;
        return inode_at(directory, file.slot, above);
    }

    Result<void> do_write(Inode inode, std::uint64_t at, std::span<const std::byte> from) override {
        if (from.empty()) return {};
        if (at > fat::longest_file || from.size() > fat::longest_file - at) return too_long(inode);
        auto& file = *TRY(file_of(inode));
        TRY_VOID(lengthen(inode, file, at, at + from.size()));
        return each_run(file, at, from.size(), [&](std::uint64_t place, std::uint64_t length) {
            const auto part = from.first(length);
            from = from.subspan(length);
            return disk_->write({place}, part);
        });
    }

    Result<void> do_truncate(Inode inode, std::uint64_t size) override {
        if (size > fat::longest_file) return too_long(inode);
        auto& file = *TRY(file_of(inode));
        if (size >= size_of(TRY(entry_of(inode)))) return lengthen(inode, file, size, size);
        // The directory must say so before the clusters are free.
        TRY_VOID(commit());
        const auto kept = divide_up(size, layout().cluster_bytes());
        const auto entry = TRY(change_entry(inode));
        store_size(entry, size);
        if (kept == 0) store_cluster(entry, 0);
        TRY_VOID(commit());
        if (kept < file.chain.size()) {
            if (kept > 0) TRY_VOID(table_.end_at(file.chain[kept - 1]));
            lost_.insert(lost_.end(), file.chain.begin() + static_cast<std::ptrdiff_t>(kept), file.chain.end());
            file.chain.resize(kept);
            changed_ = true;
        }
        return {};
    }

    Result<void> do_remove(Inode above, const std::string& name) override {
        TRY_VOID(forget_directories());
        auto& directory = *TRY(directory_of(above));
        const auto& file = *TRY(find(directory, name));
        const auto entry = directory.list.entry(file.slot);
        const auto inode = inode_at(directory, file.slot, above);
        if (type_of(entry) == FileType::directory && !TRY(directory_of(inode))->list.files().empty()) {
            return fail(Errc::invalid_argument, printable(name, 64), "the directory is not empty");
        }
        const auto chain = TRY(table_.chain(cluster_of(entry)));
        lost_.insert(lost_.end(), chain.begin(), chain.end());
        directory.list.remove(file);
        forget(inode);
        changed_ = true;
        return {};
    }

    Result<void> do_replace(Inode above, const DirectoryEntry& from, const DirectoryEntry& to) override {
        auto& directory = *TRY(directory_of(above));
        const auto& made = *TRY(find(directory, from.name));
        const auto& old = *TRY(find(directory, to.name));
        const auto made_entry = directory.list.entry(made.slot);
        const std::vector<std::byte> contents(made_entry.begin(), made_entry.end());
        const auto chain = TRY(table_.chain(cluster_of(directory.list.entry(old.slot))));
        const bool is_on_disk = made.written < written_;
        forget(inode_at(directory, made.slot));
        forget(inode_at(directory, old.slot));
        directory.list.remove(made);
        changed_ = true;
        // Two entries must never lead to the same clusters.
        if (is_on_disk) TRY_VOID(commit());
        // All but the name, and the letters of it that are small.
        const auto entry = directory.list.change(old.slot);
        constexpr std::size_t attributes = 11;
        constexpr std::size_t letters = 12;
        entry[attributes] = contents[attributes];
        std::ranges::copy(std::span(contents).subspan(letters + 1), entry.subspan(letters + 1).begin());
        lost_.insert(lost_.end(), chain.begin(), chain.end());
        changed_ = true;
        return {};
    }

    Result<void> do_close() override { return commit(); }

private:
    struct Directory {
        Inode inode = 0;
        std::uint32_t first = 0;                // its first cluster as ".." of a directory in it has it: 0 for the root
        std::vector<std::uint32_t> chain = {};  // empty: the root of FAT12 and FAT16
        FatDirectory list = {};
    };
    struct File {
        Inode inode = 0;
        std::vector<std::uint32_t> chain = {};
    };
    struct Place {
        Inode directory = 0;
        std::size_t slot = 0;
    };

    [[nodiscard]] const fat::Layout& layout() const { return volume_.layout; }

    static std::unexpected<Error> too_long(Inode inode) {
        return fail(Errc::invalid_argument, inode_place(inode), "FAT holds files of less than 4 GiB");
    }

    // ---- Directories ----

    /// Where a byte of a directory lies in the disk.
    [[nodiscard]] std::uint64_t place_in(const Directory& directory, std::uint64_t at) const {
        if (directory.chain.empty()) return layout().root_start() * layout().sector + at;
        return layout().at(directory.chain[at / layout().cluster_bytes()]) + at % layout().cluster_bytes();
    }

    /// The inode of an entry, which can be found by it from now on.
    Inode inode_at(const Directory& directory, std::size_t slot) { return inode_at(directory, slot, directory.inode); }
    Inode inode_at(const Directory& directory, std::size_t slot, Inode above) {
        const auto place = place_in(directory, slot * fat::entry_bytes) - layout().root_start() * layout().sector;
        const Inode inode = place / fat::entry_bytes + first_inode;
        places_[inode] = {above, slot};
        return inode;
    }

    Result<Directory*> directory_of(Inode inode) {
        if (const auto found = directories_.find(inode); found != directories_.end()) return &found->second;
        Directory directory{.inode = inode};
        auto first = volume_.root;
        if (inode != fat_root) {
            const auto entry = TRY(entry_of(inode));
            if (type_of(entry) != FileType::directory)
                return fail(Errc::invalid_argument, inode_place(inode), "this is no directory");
            first = directory.first = cluster_of(entry);
            if (first == 0) return fail(Errc::corrupt, inode_place(inode), "the directory has no clusters");
        }
        directory.chain = TRY(table_.chain(first));
        const auto size = directory.chain.empty() ? layout().root_sectors() * layout().sector
                                                  : directory.chain.size() * layout().cluster_bytes();
        if (size > fat::most_directory_bytes + layout().cluster_bytes())
            return fail(Errc::corrupt, inode_place(inode), "the directory is longer than FAT allows");
        std::vector<std::byte> bytes(size);
        const auto piece = directory.chain.empty() ? size : layout().cluster_bytes();
        for (std::uint64_t at = 0; at < size; at += piece)
            TRY_VOID(disk_->read({place_in(directory, at)}, std::span(bytes).subspan(at, piece)));
        TRY_VOID(directory.list.load(std::move(bytes), layout().sector));
        kept_bytes_ += size;
        return &directories_.emplace(inode, std::move(directory)).first->second;
    }

    /// Writes and forgets directories if there are many in memory. Pointers to them do not survive it.
    Result<void> forget_directories() {
        if (kept_bytes_ < most_kept_bytes) return {};
        TRY_VOID(commit());
        directories_.clear();
        kept_bytes_ = 0;
        return {};
    }

    static Result<const FatDirectory::File*> find(const Directory& directory, const std::string& name) {
        const auto* const file = directory.list.find(name);
        if (file == nullptr) return fail(Errc::not_found, printable(name, 64), "there is no such file in the disk");
        return file;
    }

    /// Where the entries of a new file go. The directory becomes longer if it must.
    Result<std::size_t> room_in(Directory& directory, const std::string& name) {
        const auto count = fat::entries_of(name);
        for (;;) {
            if (const auto at = directory.list.room_for(count)) return *at;
            if (directory.chain.empty()) return fail(Errc::no_space, printable(name, 64), "the root directory is full");
            if (directory.list.size() + layout().cluster_bytes() > fat::most_directory_bytes)
                return fail(Errc::no_space, printable(name, 64), "the directory is full");
            const auto taken = TRY(take(1, directory.chain.back()));
            TRY_VOID(disk_->write_zeroes({layout().at(taken.front())}, layout().cluster_bytes()));
            directory.chain.push_back(taken.front());
            directory.list.grow(layout().cluster_bytes());
            kept_bytes_ += layout().cluster_bytes();
        }
    }

    /// Writes an empty directory, and returns its cluster.
    Result<std::uint32_t> new_directory(std::uint32_t above, std::int64_t time) {
        const auto cluster = TRY(take(1, 0)).front();
        std::vector<std::byte> entries;
        fat::add_entry(entries, fmt::format("{:<11}", "."), fat::is_directory, cluster, 0, time);
        fat::add_entry(entries, fmt::format("{:<11}", ".."), fat::is_directory, above, 0, time);
        entries.resize(layout().cluster_bytes());
        TRY_VOID(disk_->write({layout().at(cluster)}, entries));
        return cluster;
    }

    // ---- Files ----

    Result<std::pair<Directory*, std::size_t>> placed(Inode inode) {
        const auto place = places_.find(inode);
        if (place == places_.end())
            return fail(Errc::not_found, inode_place(inode), "the file system has no such inode");
        return std::pair(TRY(directory_of(place->second.directory)), place->second.slot);
    }
    Result<std::span<const std::byte>> entry_of(Inode inode) {
        const auto [directory, slot] = TRY(placed(inode));
        return directory->list.entry(slot);
    }
    Result<std::span<std::byte>> change_entry(Inode inode) {
        const auto [directory, slot] = TRY(placed(inode));
        changed_ = true;
        return directory->list.change(slot);
    }

    Result<File*> file_of(Inode inode) {
        if (file_.inode == inode) return &file_;
        if (TRY(do_stat(inode)).type != FileType::regular)
            return fail(Errc::invalid_argument, inode_place(inode), "this is no regular file");
        auto chain = TRY(table_.chain(cluster_of(TRY(entry_of(inode)))));
        file_ = {inode, std::move(chain)};
        return &file_;
    }

    /// Forgets what is in memory of a file or directory that was removed or changed.
    void forget(Inode inode) {
        places_.erase(inode);
        directories_.erase(inode);
        if (file_.inode == inode) file_ = {};
    }

    /// Makes a file at least `size` bytes long. Between its old end and `zeros_to`, it has zeros then.
    Result<void> lengthen(Inode inode, File& file, std::uint64_t zeros_to, std::uint64_t size) {
        const std::uint64_t old = size_of(TRY(entry_of(inode)));
        if (old > file.chain.size() * layout().cluster_bytes())
            return fail(Errc::corrupt, inode_place(inode), "its clusters end before its size does");
        const auto wanted = divide_up(size, layout().cluster_bytes());
        if (wanted > file.chain.size()) {
            const auto last = file.chain.empty() ? 0 : file.chain.back();
            const auto taken = TRY(take(wanted - file.chain.size(), last));
            file.chain.insert(file.chain.end(), taken.begin(), taken.end());
        }
        if (zeros_to > old) {
            TRY_VOID(each_run(
                file, old, zeros_to - old,
                [&](std::uint64_t place, std::uint64_t length) { return disk_->write_zeroes({place}, length); }));
        }
        if (size <= old) return {};
        const auto entry = TRY(change_entry(inode));
        store_size(entry, size);
        store_cluster(entry, file.chain.front());
        return {};
    }

    /// Calls `work` with place and length of the parts of a file that lie in one piece.
    template <class Work>
    Result<void> each_run(const File& file, std::uint64_t at, std::uint64_t length, Work&& work) {
        const auto cluster_bytes = layout().cluster_bytes();
        while (length > 0) {
            auto index = at / cluster_bytes;
            const auto place = layout().at(file.chain[index]) + at % cluster_bytes;
            auto part = cluster_bytes - at % cluster_bytes;
            while (part < length && file.chain[index] + 1 == file.chain[index + 1]) {
                part += cluster_bytes;
                ++index;
            }
            part = std::min(part, length);
            TRY_VOID(work(place, part));
            at += part;
            length -= part;
        }
        return {};
    }

    // ---- Clusters ----

    /// Takes clusters. Those of files that were removed become free only when the directories were written.
    Result<std::vector<std::uint32_t>> take(std::uint64_t count, std::uint32_t last) {
        auto taken = table_.take(count, last);
        if (!taken && taken.error().code == Errc::no_space && !lost_.empty()) {
            TRY_VOID(commit());
            taken = table_.take(count, last);
        }
        changed_ = true;
        return taken;
    }

    /// Writes all changes, and makes them durable. If that fails once, the disk stays marked as in use.
    Result<void> commit() {
        if (failure_) return std::unexpected(*failure_);
        auto done = changed_ ? write_all() : Result<void>();
        if (!done) failure_ = done.error();
        return done;
    }

    Result<void> write_all() {
        constexpr std::uint8_t in_use = 1;
        TRY_VOID(write_state(volume_.state | in_use));
        TRY_VOID(disk_->flush());  // contents
        TRY_VOID(table_.write_back());
        TRY_VOID(disk_->flush());
        for (auto& [inode, directory] : directories_) {
            for (const auto sector : std::exchange(directory.list.changed, {}))
                TRY_VOID(disk_->write({place_in(directory, sector * layout().sector)}, directory.list.sector(sector)));
        }
        TRY_VOID(disk_->flush());
        ++written_;
        for (const auto cluster : std::exchange(lost_, {})) TRY_VOID(table_.release(cluster));
        TRY_VOID(table_.write_back());
        TRY_VOID(table_.write_info());
        TRY_VOID(disk_->flush());
        TRY_VOID(write_state(volume_.state));
        TRY_VOID(disk_->flush());
        changed_ = false;
        return {};
    }

    /// What the boot sector says of whether the file system is in use.
    Result<void> write_state(std::uint8_t state) {
        const auto byte = std::byte{state};
        return disk_->write({volume_.state_at}, std::span(&byte, 1));
    }

    std::shared_ptr<Disk> disk_;
    const FatVolume volume_;
    Content content_;
    FatTable table_;
    std::map<Inode, Directory> directories_;
    std::uint64_t kept_bytes_ = 0;  // of them
    std::map<Inode, Place> places_;
    File file_;                        // the last one that was used
    std::vector<std::uint32_t> lost_;  // clusters of removed files
    unsigned written_ = 0;             // how often the directories were written
    bool changed_ = false;
    std::optional<Error> failure_;  // of writing changes
};

}  // namespace

Result<std::unique_ptr<FileSystem>> change_fat(std::shared_ptr<Disk> disk, const Content& content) {
    const auto volume = TRY(read_fat_volume(*disk));
    auto files = std::make_unique<FatFileSystem>(std::move(disk), volume, content);
    TRY_VOID(files->open());
    return files;
}

}  // namespace qcow
