// What a disk holds, told by signatures. The offsets are those of the formats' own documents, which each line names by
// its format: most formats begin with, or have at a fixed offset, a number that nothing else has there.

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstring>
#include <vector>

#include "base/bits.h"
#include "base/within_memory.h"
#include "filesystem/little_endian.h"
#include "filesystem/names.h"
#include "qcow/filesystem.h"

namespace qcow {
namespace {

/// The first bytes of a disk hold nearly all signatures. What lies further back is read when it is asked for.
class Head {
public:
    static constexpr std::size_t kept = 72 * KiB;

    static Result<Head> read(Disk& disk) {
        Head head(disk);
        head.bytes_.resize(std::min<std::uint64_t>(kept, disk.size()));
        TRY_VOID(disk.read({0}, head.bytes_));
        return head;
    }

    /// Bytes at an offset; zeros where the disk has none, or where they cannot be read.
    [[nodiscard]] std::vector<std::byte> at(std::uint64_t offset, std::size_t length) const {
        std::vector<std::byte> found(length);
        if (offset >= disk_->size()) return found;
        const auto part = std::span(found).first(std::min<std::uint64_t>(length, disk_->size() - offset));
        if (lies_within(offset, part.size(), bytes_.size())) {
            std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(offset), part.size(), part.begin());
        } else if (!disk_->read({offset}, part)) {
            std::ranges::fill(found, std::byte{0});
        }
        return found;
    }
    template <class T>
    [[nodiscard]] T le(std::uint64_t offset) const {
        return load_le<T>(at(offset, sizeof(T)), 0);
    }
    template <class T>
    [[nodiscard]] T be(std::uint64_t offset) const {
        return load_be<T>(at(offset, sizeof(T)), 0);
    }
    [[nodiscard]] bool has(std::uint64_t offset, std::string_view signature) const {
        return std::ranges::equal(at(offset, signature.size()), as_bytes(signature));
    }
    /// Text in front of the first zero, without spaces at its end.
    [[nodiscard]] std::string text(std::uint64_t offset, std::size_t length) const {
        const auto bytes = at(offset, length);
        std::string found(reinterpret_cast<const char*>(bytes.data()), bytes.size());
        found.resize(std::min(found.size(), found.find('\0')));
        while (found.ends_with(' ')) found.pop_back();
        return found;
    }
    [[nodiscard]] std::string uuid(std::uint64_t offset) const {
        const auto bytes = at(offset, 16);
        return is_zero(bytes) ? std::string() : uuid_text(bytes);
    }
    [[nodiscard]] std::uint64_t size() const { return disk_->size(); }

private:
    explicit Head(Disk& disk) : disk_(&disk) {}
    Disk* disk_;
    std::vector<std::byte> bytes_;
};

using Found = std::optional<Content>;

Found find_ext(const Head& head) {
    constexpr std::uint64_t super = 1024;
    if (head.le<std::uint16_t>(super + 0x38) != 0xef53) return {};
    const auto compatible = head.le<std::uint32_t>(super + 0x5c);
    const auto incompatible = head.le<std::uint32_t>(super + 0x60);
    const auto read_only = head.le<std::uint32_t>(super + 0x64);
    std::string type = "ext2";
    if ((compatible & 0x4) != 0) type = "ext3";                                   // has_journal
    if ((incompatible & ~0x16U) != 0 || (read_only & ~0x7U) != 0) type = "ext4";  // what ext3 does not have
    if ((incompatible & 0x8) != 0) type = "jbd";                                  // a journal of its own
    return Content{type, head.text(super + 0x78, 16), head.uuid(super + 0x68)};
}

Found find_xfs(const Head& head) {
    if (!head.has(0, "XFSB")) return {};
    return Content{"xfs", head.text(108, 12), head.uuid(32)};
}

Found find_btrfs(const Head& head) {
    constexpr std::uint64_t super = 64 * KiB;
    if (!head.has(super + 64, "_BHRfS_M")) return {};
    return Content{"btrfs", head.text(super + 0x12b, 256), head.uuid(super + 32)};
}

std::string serial_text(std::uint32_t serial) { return fmt::format("{:04X}-{:04X}", serial >> 16, serial & 0xffff); }

/// The label of a directory of FAT: the entry with the attribute "volume".
std::string fat_label(const Head& head, std::uint64_t directory, std::size_t length) {
    const auto entries = head.at(directory, std::min<std::size_t>(length, 64 * KiB));
    for (std::size_t i = 0; i + 32 <= entries.size(); i += 32) {
        const auto first = static_cast<std::uint8_t>(entries[i]);
        const auto attribute = static_cast<std::uint8_t>(entries[i + 11]);
        if (first == 0) break;
        if (first == 0xe5 || (attribute & 0x3f) == 0x0f || (attribute & 0x08) == 0) continue;
        std::string label(reinterpret_cast<const char*>(entries.data()) + i, 11);
        if (label[0] == 0x05) label[0] = static_cast<char>(0xe5);
        while (label.ends_with(' ')) label.pop_back();
        return label;
    }
    return {};
}

Found find_fat(const Head& head) {
    const auto sector = head.le<std::uint16_t>(11);
    const auto cluster = head.le<std::uint8_t>(13);
    const auto media = head.le<std::uint8_t>(21);
    const auto reserved = head.le<std::uint16_t>(14);
    const auto tables = head.le<std::uint8_t>(16);
    if (!std::has_single_bit(sector) || sector < 512 || sector > 4096 || !std::has_single_bit(cluster)) return {};
    if (media < 0xf0 || reserved == 0 || tables == 0 || tables > 4) return {};
    const auto root_entries = head.le<std::uint16_t>(17);
    const auto short_length = head.le<std::uint16_t>(22);
    const std::uint64_t length = short_length != 0 ? short_length : head.le<std::uint32_t>(36);
    if (length == 0 || head.has(3, "NTFS    ")) return {};
    const std::uint64_t data = (reserved + tables * length) * sector;  // for FAT12 and FAT16, the root directory
    std::uint64_t extended = 38;                                       // the extended boot record
    Content content{"vfat", {}, {}};
    if (short_length == 0) {
        extended = 66;
        const std::uint64_t root = std::max<std::uint32_t>(head.le<std::uint32_t>(44), 2) - 2;
        content.label = fat_label(head, data + root * cluster * sector, std::size_t{cluster} * sector);
    } else {
        content.label = fat_label(head, data, std::size_t{root_entries} * 32);
    }
    if (head.le<std::uint8_t>(extended) == 0x29) {
        content.uuid = serial_text(head.le<std::uint32_t>(extended + 1));
        if (content.label.empty()) content.label = head.text(extended + 5, 11);
        if (content.label == "NO NAME") content.label.clear();
    }
    return content;
}

Found find_exfat(const Head& head) {
    if (!head.has(3, "EXFAT   ")) return {};
    Content content{"exfat", {}, serial_text(head.le<std::uint32_t>(100))};
    const auto sector_shift = head.le<std::uint8_t>(108);
    const auto cluster_shift = head.le<std::uint8_t>(109);
    if (sector_shift < 9 || sector_shift > 12 || cluster_shift > 25 - sector_shift) return content;
    const std::uint64_t heap = std::uint64_t{head.le<std::uint32_t>(88)} << sector_shift;
    const std::uint64_t root = std::max<std::uint32_t>(head.le<std::uint32_t>(96), 2) - 2;
    const auto entries = head.at(heap + (root << (sector_shift + cluster_shift)), 4096);
    for (std::size_t i = 0; i + 32 <= entries.size() && entries[i] != std::byte{0}; i += 32) {
        if (entries[i] != std::byte{0x83}) continue;  // the volume label, of at most 11 units
        const auto units = std::min<std::size_t>(static_cast<std::uint8_t>(entries[i + 1]), 11);
        content.label = utf16_text(std::span(entries).subspan(i + 2, units * 2));
        break;
    }
    return content;
}

/// The label of NTFS: the attribute 0x60 of file 3, $Volume.
std::string ntfs_label(const Head& head) {
    const auto sector = head.le<std::uint16_t>(11);
    const auto cluster_code = head.le<std::uint8_t>(13);
    const auto record_code = static_cast<std::int8_t>(head.le<std::uint8_t>(64));
    const std::uint64_t sectors = cluster_code > 128 ? bit(std::min(256U - cluster_code, 20U)) : cluster_code;
    const std::uint64_t cluster = sectors * sector;
    const std::uint64_t record_bytes =
        record_code < 0 ? bit(std::min<unsigned>(static_cast<unsigned>(-record_code), 16)) : record_code * cluster;
    if (record_bytes < 256 || record_bytes > 64 * KiB) return {};
    const auto mft = head.le<std::uint64_t>(48);
    if (mft > head.size() / std::max<std::uint64_t>(cluster, 1)) return {};
    const auto record = head.at(mft * cluster + 3 * record_bytes, record_bytes);
    if (!std::ranges::equal(std::span(record).first(4), as_bytes("FILE"))) return {};
    std::size_t at = load_le<std::uint16_t>(record, 20);
    while (at + 24 <= record.size()) {
        const auto type = load_le<std::uint32_t>(record, at);
        const auto length = load_le<std::uint32_t>(record, at + 4);
        if (type == 0xffffffff || length < 24 || length > record.size() - at) break;
        if (type == 0x60) {
            const auto size = load_le<std::uint32_t>(record, at + 16);
            const auto offset = load_le<std::uint16_t>(record, at + 20);
            if (!lies_within(offset, size, length)) break;
            return utf16_text(std::span(record).subspan(at + offset, size));
        }
        at += length;
    }
    return {};
}

Found find_ntfs(const Head& head) {
    if (head.has(3, "-FVE-FS-")) return Content{"BitLocker", {}, {}};
    if (!head.has(3, "NTFS    ")) return {};
    return Content{"ntfs", ntfs_label(head), fmt::format("{:016X}", head.le<std::uint64_t>(72))};
}

Found find_iso(const Head& head) {
    if (head.has(32 * KiB + 1, "CD001")) {
        const auto digits = head.text(32 * KiB + 813, 16);  // the date of creation
        const bool dated =
            digits.size() == 16 && std::ranges::all_of(digits, [](unsigned char c) { return std::isdigit(c); });
        const auto part = [&](std::size_t at, std::size_t length) { return digits.substr(at, length); };
        return Content{"iso9660", head.text(32 * KiB + 40, 32),
                       dated && digits != "0000000000000000"
                           ? fmt::format("{}-{}-{}-{}-{}-{}-{}", part(0, 4), part(4, 2), part(6, 2), part(8, 2),
                                         part(10, 2), part(12, 2), part(14, 2))
                           : std::string()};
    }
    for (std::uint64_t sector = 16; sector < 24; ++sector)
        if (head.has(sector * 2048 + 1, "NSR02") || head.has(sector * 2048 + 1, "NSR03")) return Content{"udf", {}, {}};
    return {};
}

Found find_swap(const Head& head) {
    for (const std::uint64_t page : {4 * KiB, 8 * KiB, 16 * KiB, 64 * KiB}) {
        if (head.has(page - 10, "SWAPSPACE2")) return Content{"swap", head.text(1024 + 28, 16), head.uuid(1024 + 12)};
        if (head.has(page - 10, "SWAP-SPACE")) return Content{"swap", {}, {}};
    }
    return {};
}

Found find_luks(const Head& head) {
    if (!head.has(0, std::string_view("LUKS\xba\xbe", 6))) return {};
    return Content{"crypto_LUKS", head.be<std::uint16_t>(6) == 2 ? head.text(24, 48) : std::string(),
                   head.text(168, 40)};
}

Found find_lvm(const Head& head) {
    for (std::uint64_t sector = 0; sector < 4; ++sector) {
        const std::uint64_t label = sector * 512;
        if (!head.has(label, "LABELONE") || !head.has(label + 24, "LVM2 001")) continue;
        const auto id = head.text(label + head.le<std::uint32_t>(label + 20), 32);
        if (id.size() != 32) return Content{"LVM2_member", {}, {}};
        return Content{"LVM2_member",
                       {},
                       fmt::format("{}-{}-{}-{}-{}-{}-{}", id.substr(0, 6), id.substr(6, 4), id.substr(10, 4),
                                   id.substr(14, 4), id.substr(18, 4), id.substr(22, 4), id.substr(26, 6))};
    }
    return {};
}

Found find_raid(const Head& head) {
    constexpr std::uint32_t magic = 0xa92b4efc;
    const std::uint64_t end = align_down(head.size(), 64 * KiB);
    if (end >= 128 * KiB && head.le<std::uint32_t>(end - 64 * KiB) == magic)
        return Content{"linux_raid_member", {}, {}};
    const std::uint64_t last = head.size() < 16 * KiB ? 0 : align_down(head.size() - 8 * KiB, 4 * KiB);
    for (const std::uint64_t super : {4 * KiB, std::uint64_t{0}, last}) {
        if (head.le<std::uint32_t>(super) == magic && head.le<std::uint32_t>(super + 4) == 1)
            return Content{"linux_raid_member", head.text(super + 32, 32), head.uuid(super + 16)};
    }
    return {};
}

Found find_zfs(const Head& head) {
    for (std::uint64_t i = 0; i < 8; ++i)  // the first uberblocks of the first label
        if (head.le<std::uint64_t>(128 * KiB + i * KiB) == 0x00bab10c) return Content{"zfs_member", {}, {}};
    return {};
}

Found find_hfs(const Head& head) {
    if (head.has(1024, "H+") || head.has(1024, "HX")) return Content{"hfsplus", {}, {}};
    if (head.has(1024, "BD") && head.be<std::uint16_t>(1024 + 18) != 0) return Content{"hfs", {}, {}};
    return {};
}

Found find_ufs(const Head& head) {
    for (const std::uint64_t super : {8 * KiB, 64 * KiB}) {  // UFS1 and UFS2
        const auto magic = head.le<std::uint32_t>(super + 1372);
        if (magic == 0x00011954 || magic == 0x19540119 || magic == 0x54190100 || magic == 0x19015419)
            return Content{"ufs", head.text(super + 680, 32), {}};
    }
    return {};
}

Found find_erofs(const Head& head) {
    if (head.le<std::uint32_t>(1024) != 0xe0f5e1e2) return {};
    return Content{"erofs", head.text(1024 + 64, 16), head.uuid(1024 + 48)};
}

Found find_f2fs(const Head& head) {
    if (head.le<std::uint32_t>(1024) != 0xf2f52010) return {};
    return Content{"f2fs", utf16_text(head.at(1024 + 124, 256)), head.uuid(1024 + 108)};
}

struct Signature {
    std::uint64_t at;
    std::string_view bytes;
    std::string_view type;
};
constexpr std::array signatures = {
    Signature{0, "hsqs", "squashfs"},
    Signature{0x10034, "ReIsEr2Fs", "reiserfs"},
    Signature{0x10034, "ReIsErFs", "reiserfs"},
    Signature{0x8000, "JFS1", "jfs"},
    Signature{32, "NXSB", "apfs"},
    Signature{0, "-rom1fs-", "romfs"},
    Signature{0, "bluestore block device", "ceph_bluestore"},
    Signature{257, "ustar", "tar"},
    Signature{0, "070701", "cpio"},
    Signature{0, "070702", "cpio"},
    Signature{0, "070707", "cpio"},
    Signature{0, "PK\3\4", "zip"},
    Signature{0, "7z\xbc\xaf\x27\x1c", "7z"},
};

Found find_signature(const Head& head) {
    for (const auto& [at, bytes, type] : signatures)
        if (head.has(at, bytes)) return Content{std::string(type), {}, {}};
    return {};
}

Result<Content> identified(Disk& disk) {
    const auto head = TRY(Head::read(disk));
    // Containers first: their contents may begin with another signature.
    constexpr std::array finders = {find_luks,  find_raid, find_lvm,   find_xfs, find_ntfs,     find_exfat,
                                    find_fat,   find_ext,  find_btrfs, find_iso, find_swap,     find_hfs,
                                    find_erofs, find_f2fs, find_ufs,   find_zfs, find_signature};
    for (const auto find : finders)
        if (auto found = find(head)) return *std::move(found);
    return Content{};
}

}  // namespace

Result<Content> identify(Disk& disk) {
    return within_memory([&] { return identified(disk); });
}

}  // namespace qcow
