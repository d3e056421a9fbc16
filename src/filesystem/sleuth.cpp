// FAT, exFAT, NTFS, HFS+, UFS and YAFFS2, by The Sleuth Kit.

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <optional>

#include "base/bits.h"
#include "base/try.h"
#include "filesystem/fat_format.h"
#include "filesystem/file_runs.h"
#include "filesystem/little_endian.h"
#include "filesystem/names.h"
#include "filesystem/readers.h"
#include "filesystem/sleuth_library.h"
#include "qcow/text.h"

namespace qcow {
namespace {

/// More blocks than this are not asked one by one whether they are free.
constexpr std::uint64_t most_counted_blocks = std::uint64_t{1} << 24;
/// The records of NTFS itself: $MFT, $LogFile, ...
constexpr TSK_INUM_T first_ntfs_file = 16;

FileType type_of_meta(TSK_FS_META_TYPE_ENUM type) {
    switch (type) {
        case TSK_FS_META_TYPE_REG:
        case TSK_FS_META_TYPE_VIRT: return FileType::regular;
        case TSK_FS_META_TYPE_DIR:
        case TSK_FS_META_TYPE_VIRT_DIR: return FileType::directory;
        case TSK_FS_META_TYPE_LNK: return FileType::symbolic_link;
        case TSK_FS_META_TYPE_CHR: return FileType::character_device;
        case TSK_FS_META_TYPE_BLK: return FileType::block_device;
        case TSK_FS_META_TYPE_FIFO: return FileType::fifo;
        case TSK_FS_META_TYPE_SOCK: return FileType::socket;
        default: return FileType::unknown;
    }
}

FileType type_of_name(TSK_FS_NAME_TYPE_ENUM type) {
    switch (type) {
        case TSK_FS_NAME_TYPE_REG: return FileType::regular;
        case TSK_FS_NAME_TYPE_DIR: return FileType::directory;
        case TSK_FS_NAME_TYPE_LNK: return FileType::symbolic_link;
        case TSK_FS_NAME_TYPE_CHR: return FileType::character_device;
        case TSK_FS_NAME_TYPE_BLK: return FileType::block_device;
        case TSK_FS_NAME_TYPE_FIFO: return FileType::fifo;
        case TSK_FS_NAME_TYPE_SOCK: return FileType::socket;
        default: return FileType::unknown;
    }
}

/// The type is never left to The Sleuth Kit: its readers of other types meet more bytes than they need to, and the one
/// of ext has functions with the names of libext2fs.
TSK_FS_TYPE_ENUM type_of_content(std::string_view type) {
    if (type == "vfat" || type == "exfat") return TSK_FS_TYPE_FAT_DETECT;
    if (type == "ntfs") return TSK_FS_TYPE_NTFS_DETECT;
    if (type == "hfsplus" || type == "hfs") return TSK_FS_TYPE_HFS_DETECT;
    if (type == "ufs") return TSK_FS_TYPE_FFS_DETECT;
    return TSK_FS_TYPE_YAFFS2_DETECT;  // has no signature
}

/// The image that The Sleuth Kit reads: its structure, with what is ours behind it.
struct DiskImage {
    TSK_IMG_INFO base = {};
    Disk* disk = nullptr;
    std::optional<Error> error = {};  // the first one of the disk
};
static_assert(std::is_standard_layout_v<TSK_IMG_INFO>);

ssize_t read_image(TSK_IMG_INFO* base, TSK_OFF_T at, char* to, std::size_t length) {
    auto& image = *reinterpret_cast<DiskImage*>(base);  // its first member
    const auto begin = static_cast<std::uint64_t>(at);
    if (at < 0 || begin >= image.disk->size()) return -1;
    const auto part = std::min<std::uint64_t>(length, image.disk->size() - begin);
    auto done = image.disk->read({begin}, std::as_writable_bytes(std::span(to, part)));
    if (done) return static_cast<ssize_t>(part);
    if (!image.error) image.error = std::move(done).error();
    return -1;
}
void close_image(TSK_IMG_INFO*) {}
void describe_image(TSK_IMG_INFO*, FILE*) {}

// ---- Long names of FAT ----

/// The Sleuth Kit reads at most 15 entries of a long name, with 13 characters each.
constexpr std::size_t cut_name = 195;

class SleuthFileSystem final : public FileSystem {
public:
    SleuthFileSystem(const SleuthKit& kit, std::shared_ptr<Disk> disk) : kit_(kit), disk_(std::move(disk)) {
        image_.disk = disk_.get();
    }
    ~SleuthFileSystem() override {
        forget_file();
        if (fs_ != nullptr) kit_.fs_close(fs_);
        if (raw_ != nullptr) kit_.img_close(raw_);
    }

    Result<void> open(const Content& content) {
        content_ = content;
        // Their reading goes past neither the size nor the sectors that are given here.
        raw_ = kit_.img_open_external(&image_, static_cast<TSK_OFF_T>(disk_->size()), 512, read_image, close_image,
                                      describe_image);
        if (raw_ == nullptr) return failed(content.type);
        auto type = type_of_content(content.type);
        if (content.type == "vfat" && TRY(is_fat32())) type = TSK_FS_TYPE_FAT32;
        fs_ = kit_.fs_open_img(raw_, 0, type);
        if (fs_ == nullptr) return failed(content.type);
        return {};
    }

    [[nodiscard]] Inode root() const override { return fs_->root_inum; }

protected:
    Result<FileSystemInfo> do_info() override {
        FileSystemInfo info;
        info.type = content_.type.empty() ? kit_.fs_type_toname(fs_->ftype) : content_.type;
        info.label = content_.label;
        info.uuid = content_.uuid;
        info.block_bytes = fs_->block_size;
        info.bytes = fs_->block_count * fs_->block_size;
        if (fs_->last_block > fs_->last_block_act)
            info.warnings.emplace_back("the disk ends before the file system does");
        if (fs_->block_count <= most_counted_blocks) {
            std::uint64_t free = 0;
            const auto count = [](const TSK_FS_BLOCK*, void* data) {
                ++*static_cast<std::uint64_t*>(data);
                return TSK_WALK_CONT;
            };
            // NOLINTBEGIN(clang-analyzer-optin.core.EnumCastOutOfRange): a set of flags
            const auto flags =
                static_cast<TSK_FS_BLOCK_WALK_FLAG_ENUM>(TSK_FS_BLOCK_WALK_FLAG_UNALLOC | TSK_FS_BLOCK_WALK_FLAG_AONLY);
            // NOLINTEND(clang-analyzer-optin.core.EnumCastOutOfRange)
            if (kit_.fs_block_walk(fs_, fs_->first_block, fs_->last_block_act, flags, count, &free) == 0)
                info.free_bytes = free * fs_->block_size;
            kit_.error_reset();
        }
        return info;
    }

    Result<FileInfo> do_stat(Inode inode) override {
        const auto& meta = *TRY(opened_file(inode))->meta;
        FileInfo info;
        info.inode = inode;
        info.type = type_of_meta(meta.type);
        info.mode = static_cast<std::uint32_t>(meta.mode) & 07777U;
        if (content_.type != "ntfs") {  // its owners are no numbers, and The Sleuth Kit makes some up
            info.user = meta.uid;
            info.group = meta.gid;
        }
        info.links = static_cast<std::uint64_t>(std::max(meta.nlink, 0));
        info.size = static_cast<std::uint64_t>(std::max<TSK_OFF_T>(meta.size, 0));
        const auto time = [](time_t seconds, std::uint32_t nanoseconds) -> std::optional<Timestamp> {
            if (seconds == 0) return {};
            return Timestamp{seconds, std::min(nanoseconds, 999'999'999U)};
        };
        info.modified = time(meta.mtime, meta.mtime_nano);
        info.accessed = time(meta.atime, meta.atime_nano);
        info.changed = time(meta.ctime, meta.ctime_nano);
        info.created = time(meta.crtime, meta.crtime_nano);
        info.deleted = (meta.flags & TSK_FS_META_FLAG_UNALLOC) != 0;
        return info;
    }

    Result<std::vector<DirectoryEntry>> do_list(Inode directory, bool deleted, std::vector<Error>&) override {
        if (TRY(do_stat(directory)).type != FileType::directory)
            return fail(Errc::invalid_argument, place(directory), "this is no directory");
        const auto close = [this](TSK_FS_DIR* it) { kit_.fs_dir_close(it); };
        const std::unique_ptr<TSK_FS_DIR, decltype(close)> listing(kit_.fs_dir_open_meta(fs_, directory), close);
        if (!listing) return failed(place(directory));
        std::vector<DirectoryEntry> entries;
        const std::size_t count = kit_.fs_dir_getsize(listing.get());
        if (count > most_entries) {
            return fail(Errc::limit_exceeded, place(directory),
                        fmt::format("the directory has more than {} entries", most_entries));
        }
        for (std::size_t i = 0; i < count; ++i) {
            const auto* const raw = kit_.fs_dir_get_name(listing.get(), i);
            if (raw == nullptr || raw->name == nullptr) continue;
            const std::string_view name(raw->name, strnlen(raw->name, raw->name_size));
            const bool removed = (raw->flags & TSK_FS_NAME_FLAG_UNALLOC) != 0;
            if (name.empty() || name == "." || name == ".." || (removed && (!deleted || !is_entry_name(name))))
                continue;
            if (is_virtual(*raw)) continue;
            entries.push_back({std::string(name), raw->meta_addr, type_of_name(raw->type), removed});
        }
        const auto may_be_cut = [](const DirectoryEntry& entry) { return entry.name.size() >= cut_name; };
        if (content_.type == "vfat" && std::ranges::any_of(entries, may_be_cut)) {
            const auto names = TRY(long_names_of_fat(directory));
            for (auto& entry : entries) {
                if (const auto whole = names.find(entry.inode); whole != names.end()) entry.name = whole->second;
            }
        }
        return entries;
    }

    Result<DirectoryEntry> do_lookup(Inode directory, const std::string& name) override {
        auto found = FileSystem::do_lookup(directory, name);
        const bool ignores_case = content_.type == "vfat" || content_.type == "exfat";
        if (found || !ignores_case || found.error().code != Errc::not_found) return found;
        std::vector<Error> refused;  // other entries
        const auto wanted = fat::folded(name);
        for (auto& entry : TRY(list(directory, false, &refused)))
            if (wanted && fat::folded(entry.name) == wanted) return std::move(entry);
        return found;
    }

    Result<std::size_t> do_read(Inode inode, std::uint64_t at, std::span<std::byte> to) override {
        auto* const file = TRY(opened_file(inode));
        const auto size = static_cast<std::uint64_t>(std::max<TSK_OFF_T>(file->meta->size, 0));
        if (at >= size) return 0;
        TRY_VOID(verify_runs(*file));
        const auto part = std::min<std::uint64_t>(to.size(), size - at);
        const auto done = kit_.fs_file_read(file, static_cast<TSK_OFF_T>(at), reinterpret_cast<char*>(to.data()), part,
                                            TSK_FS_FILE_READ_FLAG_NONE);
        if (done < 0) return failed(place(inode));
        return static_cast<std::size_t>(done);
    }

    Result<std::vector<FileExtent>> do_extents(Inode inode, std::uint64_t at) override {
        auto* const file = TRY(opened_file(inode));
        const auto size = static_cast<std::uint64_t>(std::max<TSK_OFF_T>(file->meta->size, 0));
        const auto* const attribute = size == 0 ? nullptr : kit_.fs_file_attr_get(file);
        if (size > 0 && attribute == nullptr) return failed(place(inode));
        constexpr unsigned elsewhere = TSK_FS_ATTR_RES | TSK_FS_ATTR_ENC | TSK_FS_ATTR_COMP;
        const bool direct = attribute == nullptr ||
                            ((attribute->flags & elsewhere) == 0 && (attribute->flags & TSK_FS_ATTR_NONRES) != 0 &&
                             attribute->nrd.skiplen == 0 && fs_->block_pre_size == 0 && fs_->block_post_size == 0 &&
                             static_cast<std::uint64_t>(attribute->size) == size);
        if (!direct) return fail(Errc::unsupported, place(inode), "the contents do not lie in the disk as they are");
        TRY_VOID(verify_runs(*file));
        FileRuns runs(at, size);
        const auto written =
            attribute == nullptr ? 0 : static_cast<std::uint64_t>(std::max<TSK_OFF_T>(attribute->nrd.initsize, 0));
        for (const auto* run = attribute == nullptr ? nullptr : attribute->nrd.run; run != nullptr && !runs.full();
             run = run->next) {
            if ((run->flags & (TSK_FS_ATTR_RUN_FLAG_FILLER | TSK_FS_ATTR_RUN_FLAG_ENCRYPTED)) != 0)
                return fail(Errc::unsupported, place(inode), "a part of the contents is lost or encrypted");
            std::uint64_t begin = 0;
            std::uint64_t length = 0;
            std::uint64_t stored = 0;
            if (__builtin_mul_overflow(run->offset, fs_->block_size, &begin) ||
                __builtin_mul_overflow(run->len, fs_->block_size, &length) ||
                __builtin_mul_overflow(run->addr, fs_->block_size, &stored) || begin + length < begin)
                return fail(Errc::corrupt, place(inode), "its extents lie past any disk");
            if (length == 0) continue;
            const bool sparse = (run->flags & TSK_FS_ATTR_RUN_FLAG_SPARSE) != 0;
            const auto real = sparse || begin >= written ? 0 : std::min(length, written - begin);
            bool in_order = true;
            if (real > 0) in_order = runs.add(begin, real, GuestOffset{stored});
            if (real < length) in_order = in_order && runs.add(begin + real, length - real, {});
            if (!in_order) return fail(Errc::corrupt, place(inode), "its extents are not in order");
        }
        return std::move(runs).finished();
    }

    Result<std::string> do_read_link(Inode inode) override {
        const auto& meta = *TRY(opened_file(inode))->meta;
        if (meta.type != TSK_FS_META_TYPE_LNK || meta.link == nullptr)
            return fail(Errc::invalid_argument, place(inode), "this is no symbolic link");
        return std::string(meta.link, strnlen(meta.link, longest_link));
    }

private:
    /// FAT32 has no length of its tables with 16 bits. The number of clusters, by which The Sleuth Kit goes, may be
    /// that of FAT16.
    [[nodiscard]] Result<bool> is_fat32() const {
        std::array<std::byte, 512> sector = {};
        TRY_VOID(disk_->read({0}, std::span(sector).first(std::min<std::uint64_t>(sector.size(), disk_->size()))));
        return load_le<std::uint16_t>(sector, 22) == 0;
    }

    static std::string place(Inode inode) { return fmt::format("inode {}", inode); }

    /// The names of a directory of FAT that The Sleuth Kit cuts, by inode. It numbers the entries of 32 bytes from 3,
    /// behind the tables of clusters.
    Result<std::map<Inode, std::string>> long_names_of_fat(Inode directory) {
        std::array<std::byte, 512> boot = {};
        TRY_VOID(disk_->read({0}, boot));
        const std::uint64_t sector = load_le<std::uint16_t>(boot, 11);
        const std::uint64_t narrow = load_le<std::uint16_t>(boot, 22);
        const std::uint64_t table = narrow != 0 ? narrow : load_le<std::uint32_t>(boot, 36);
        const auto data = (load_le<std::uint16_t>(boot, 14) + static_cast<std::uint64_t>(boot[16]) * table) * sector;
        std::map<Inode, std::string> names;
        fat::LongName name;
        std::uint64_t left = fat::most_directory_bytes;
        for (const auto& extent : TRY(do_extents(directory, 0))) {
            if (!extent.stored || extent.stored->value < data) continue;
            const auto length = std::min(extent.length, left);
            left -= length;
            std::vector<std::byte> bytes(length);
            TRY_VOID(disk_->read(*extent.stored, bytes));
            for (std::size_t at = 0; at + fat::entry_bytes <= length; at += fat::entry_bytes) {
                auto whole = name.take(std::span(bytes).subspan(at, fat::entry_bytes));
                if (whole.empty()) continue;
                names[(extent.stored->value + at - data) / fat::entry_bytes + 3] = std::move(whole);
            }
        }
        return names;
    }

    /// Refuses a file whose clusters end before its size does. The Sleuth Kit reads zeros there.
    Result<void> verify_runs(TSK_FS_FILE& file) {
        const auto size = static_cast<std::uint64_t>(std::max<TSK_OFF_T>(file.meta->size, 0));
        const auto* const attribute = size == 0 ? nullptr : kit_.fs_file_attr_get(&file);
        if (size > 0 && attribute == nullptr) return failed(place(file.meta->addr));
        if (attribute == nullptr || (attribute->flags & TSK_FS_ATTR_NONRES) == 0 ||
            (attribute->flags & TSK_FS_ATTR_COMP) != 0)
            return {};
        std::uint64_t end = 0;
        if (const auto* const last = attribute->nrd.run_end; last != nullptr) {
            if (__builtin_mul_overflow(last->offset + last->len, fs_->block_size, &end)) return {};
            end -= std::min<std::uint64_t>(end, attribute->nrd.skiplen);
        }
        if (end >= std::min(size, static_cast<std::uint64_t>(std::max<TSK_OFF_T>(attribute->size, 0)))) return {};
        return fail(Errc::corrupt, place(file.meta->addr),
                    fmt::format("its clusters are lost after {} of {} bytes; check the file system", end, size));
    }

    /// Whether it is no file of a user: what The Sleuth Kit adds, the label, and the records of the file system itself.
    [[nodiscard]] bool is_virtual(const TSK_FS_NAME& name) const {
        if (name.type == TSK_FS_NAME_TYPE_VIRT || name.type == TSK_FS_NAME_TYPE_VIRT_DIR) return true;
        const std::string_view text(name.name);
        if (content_.type == "vfat" || content_.type == "exfat")
            return text.ends_with(" (Volume Label Entry)") || text == "$ALLOC_BITMAP" || text == "$UPCASE_TABLE";
        return content_.type == "ntfs" && name.meta_addr < first_ntfs_file && text.starts_with('$');
    }

    std::unexpected<Error> failed(const std::string& where) {
        if (image_.error) return std::unexpected(std::exchange(image_.error, std::nullopt).value().in(where));
        const auto* const text = kit_.error_get();
        kit_.error_reset();
        return fail(Errc::corrupt, where,
                    text == nullptr || *text == '\0' ? "it is damaged, and The Sleuth Kit cannot read it"
                                                     : printable(text, 300));
    }

    Result<TSK_FS_FILE*> opened_file(Inode inode) {
        if (file_ != nullptr && file_->meta->addr == inode) return file_;
        forget_file();
        if (inode < fs_->first_inum || inode > fs_->last_inum)
            return fail(Errc::not_found, place(inode), "the file system has no such inode");
        file_ = kit_.fs_file_open_meta(fs_, nullptr, inode);
        if (file_ != nullptr && file_->meta == nullptr) forget_file();
        if (file_ == nullptr) return failed(place(inode));
        return file_;
    }

    void forget_file() {
        if (file_ != nullptr) kit_.fs_file_close(file_);
        file_ = nullptr;
    }

    const SleuthKit& kit_;
    std::shared_ptr<Disk> disk_;
    DiskImage image_;
    Content content_;
    TSK_IMG_INFO* raw_ = nullptr;
    TSK_FS_INFO* fs_ = nullptr;
    TSK_FS_FILE* file_ = nullptr;
};

}  // namespace

Result<std::unique_ptr<FileSystem>> open_sleuth(std::shared_ptr<Disk> disk, const Content& content) {
    auto files = std::make_unique<SleuthFileSystem>(*TRY(load_sleuth_kit()), std::move(disk));
    TRY_VOID(files->open(content));
    return files;
}

}  // namespace qcow
