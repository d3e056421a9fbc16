#include "filesystem/names.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <utility>

#include "filesystem/little_endian.h"

namespace qcow {
namespace {

using Mbr = std::pair<std::uint8_t, std::string_view>;
// The bytes that are still met, with the names that fdisk gives them.
constexpr std::array mbr_types = {
    Mbr{0x01, "FAT12"},
    Mbr{0x04, "FAT16 <32M"},
    Mbr{0x05, "Extended"},
    Mbr{0x06, "FAT16"},
    Mbr{0x07, "HPFS/NTFS/exFAT"},
    Mbr{0x0b, "W95 FAT32"},
    Mbr{0x0c, "W95 FAT32 (LBA)"},
    Mbr{0x0e, "W95 FAT16 (LBA)"},
    Mbr{0x0f, "W95 Extended (LBA)"},
    Mbr{0x11, "Hidden FAT12"},
    Mbr{0x14, "Hidden FAT16 <32M"},
    Mbr{0x16, "Hidden FAT16"},
    Mbr{0x17, "Hidden HPFS/NTFS"},
    Mbr{0x1b, "Hidden W95 FAT32"},
    Mbr{0x1c, "Hidden W95 FAT32 (LBA)"},
    Mbr{0x1e, "Hidden W95 FAT16 (LBA)"},
    Mbr{0x27, "Hidden NTFS WinRE"},
    Mbr{0x39, "Plan 9"},
    Mbr{0x42, "SFS"},
    Mbr{0x63, "GNU HURD or SysV"},
    Mbr{0x81, "Minix / old Linux"},
    Mbr{0x82, "Linux swap / Solaris"},
    Mbr{0x83, "Linux"},
    Mbr{0x85, "Linux extended"},
    Mbr{0x86, "NTFS volume set"},
    Mbr{0x87, "NTFS volume set"},
    Mbr{0x88, "Linux plaintext"},
    Mbr{0x8e, "Linux LVM"},
    Mbr{0xa5, "FreeBSD"},
    Mbr{0xa6, "OpenBSD"},
    Mbr{0xa8, "Darwin UFS"},
    Mbr{0xa9, "NetBSD"},
    Mbr{0xab, "Darwin boot"},
    Mbr{0xaf, "HFS / HFS+"},
    Mbr{0xbe, "Solaris boot"},
    Mbr{0xbf, "Solaris"},
    Mbr{0xda, "Non-FS data"},
    Mbr{0xea, "Linux extended boot"},
    Mbr{0xee, "GPT"},
    Mbr{0xef, "EFI (FAT-12/16/32)"},
    Mbr{0xfb, "VMware VMFS"},
    Mbr{0xfc, "VMware VMKCORE"},
    Mbr{0xfd, "Linux raid autodetect"},
};

using GptName = std::pair<std::string_view, std::string_view>;
// UEFI specification 2.10, the Discoverable Partitions Specification, and the documents of the systems named.
constexpr std::array gpt_types = {
    GptName{"c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "EFI System"},
    GptName{"024dee41-33e7-11d3-9d69-0008c781f39f", "MBR partition scheme"},
    GptName{"21686148-6449-6e6f-744e-656564454649", "BIOS boot"},
    GptName{"e3c9e316-0b5c-4db8-817d-f92df00215ae", "Microsoft reserved"},
    GptName{"ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", "Microsoft basic data"},
    GptName{"5808c8aa-7e8f-42e0-85d2-e1e90434cfb3", "Microsoft LDM metadata"},
    GptName{"af9b60a0-1431-4f62-bc68-3311714a69ad", "Microsoft LDM data"},
    GptName{"de94bba4-06d1-4d40-a16a-bfd50179d6ac", "Windows recovery environment"},
    GptName{"e75caf8f-f680-4cee-afa3-b001e56efc2d", "Microsoft Storage Spaces"},
    GptName{"0fc63daf-8483-4772-8e79-3d69d8477de4", "Linux filesystem"},
    GptName{"0657fd6d-a4ab-43c4-84e5-0933c84b4f4f", "Linux swap"},
    GptName{"a19d880f-05fc-4d3b-a006-743f0f84911e", "Linux RAID"},
    GptName{"e6d6d379-f507-44c2-a23c-238f2a3df928", "Linux LVM"},
    GptName{"8da63339-0007-60c0-c436-083ac8230908", "Linux reserved"},
    GptName{"933ac7e1-2eb4-4f13-b844-0e14e2aef915", "Linux home"},
    GptName{"3b8f8425-20e0-4f3b-907f-1a25a76f98e8", "Linux server data"},
    GptName{"4d21b016-b534-45c2-a9fb-5c16e091fd2d", "Linux variable data"},
    GptName{"7ec6f557-3bc5-4aca-b293-16ef5df639d1", "Linux temporary data"},
    GptName{"bc13c2ff-59e6-4262-a352-b275fd6f7172", "Linux extended boot"},
    GptName{"44479540-f297-41b2-9af7-d131d5f0458a", "Linux root (x86)"},
    GptName{"4f68bce3-e8cd-4db1-96e7-fbcaf984b709", "Linux root (x86-64)"},
    GptName{"69dad710-2ce4-4e3c-b16c-21a1d49abed3", "Linux root (ARM)"},
    GptName{"b921b045-1df0-41c3-af44-4c6f280d3fae", "Linux root (ARM-64)"},
    GptName{"72ec70a6-cf74-40e6-bd49-4bda08e8f224", "Linux root (RISC-V-64)"},
    GptName{"8484680c-9521-48c6-9c11-b0720656f69e", "Linux /usr (x86-64)"},
    GptName{"b0e01050-ee5f-4390-949a-9101b17104e9", "Linux /usr (ARM-64)"},
    GptName{"2c7357ed-ebd2-46d9-aec1-23d437ec2bf5", "Linux root verity (x86-64)"},
    GptName{"77ff5f63-e7b6-4633-acf4-1565b864c0e6", "Linux /usr verity (x86-64)"},
    GptName{"ca7d7ccb-63ed-4c53-861c-1742536059cc", "LUKS partition"},
    GptName{"48465300-0000-11aa-aa11-00306543ecac", "Apple HFS/HFS+"},
    GptName{"7c3457ef-0000-11aa-aa11-00306543ecac", "Apple APFS"},
    GptName{"55465300-0000-11aa-aa11-00306543ecac", "Apple UFS"},
    GptName{"52414944-0000-11aa-aa11-00306543ecac", "Apple RAID"},
    GptName{"426f6f74-0000-11aa-aa11-00306543ecac", "Apple boot"},
    GptName{"83bd6b9d-7f41-11dc-be0b-001560b84f0f", "FreeBSD boot"},
    GptName{"516e7cb4-6ecf-11d6-8ff8-00022d09712b", "FreeBSD data"},
    GptName{"516e7cb5-6ecf-11d6-8ff8-00022d09712b", "FreeBSD swap"},
    GptName{"516e7cb6-6ecf-11d6-8ff8-00022d09712b", "FreeBSD UFS"},
    GptName{"516e7cba-6ecf-11d6-8ff8-00022d09712b", "FreeBSD ZFS"},
    GptName{"824cc7a0-36a8-11e3-890a-952519ad3f61", "OpenBSD data"},
    GptName{"6a898cc3-1dd2-11b2-99a6-080020736631", "Solaris /usr or ZFS"},
    GptName{"fe3a2a5d-4f32-41a7-b725-accc3285a309", "ChromeOS kernel"},
    GptName{"3cb8e202-3b7e-47dd-8a3c-7ff2a13cfcec", "ChromeOS root"},
    GptName{"aa31e02a-400f-11db-9590-000c2911d1b8", "VMware VMFS"},
    GptName{"9e1a2d38-c612-4316-aa26-8b49521e5a8b", "PowerPC PReP boot"},
};

void append_utf8(std::string& text, std::uint32_t code) {
    const auto add = [&](std::uint32_t byte) { text += static_cast<char>(byte); };
    if (code < 0x80) {
        add(code);
    } else if (code < 0x800) {
        add(0xc0 | code >> 6);
        add(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
        add(0xe0 | code >> 12);
        add(0x80 | (code >> 6 & 0x3f));
        add(0x80 | (code & 0x3f));
    } else {
        add(0xf0 | code >> 18);
        add(0x80 | (code >> 12 & 0x3f));
        add(0x80 | (code >> 6 & 0x3f));
        add(0x80 | (code & 0x3f));
    }
}

std::string hex(std::span<const std::byte> bytes) {
    std::string text;
    for (const auto byte : bytes) text += fmt::format("{:02x}", static_cast<std::uint8_t>(byte));
    return text;
}

}  // namespace

std::string mbr_type_name(std::uint8_t type) {
    const auto* const found = std::ranges::find(mbr_types, type, &Mbr::first);
    return found == mbr_types.end() ? std::string() : std::string(found->second);
}

std::string gpt_type_name(std::string_view guid) {
    const auto* const found = std::ranges::find(gpt_types, guid, &GptName::first);
    return found == gpt_types.end() ? std::string() : std::string(found->second);
}

std::string guid_text(std::span<const std::byte> guid) {
    return fmt::format("{:08x}-{:04x}-{:04x}-{}-{}", load_le<std::uint32_t>(guid, 0), load_le<std::uint16_t>(guid, 4),
                       load_le<std::uint16_t>(guid, 6), hex(guid.subspan(8, 2)), hex(guid.subspan(10, 6)));
}

std::string uuid_text(std::span<const std::byte> uuid) {
    return fmt::format("{}-{}-{}-{}-{}", hex(uuid.first(4)), hex(uuid.subspan(4, 2)), hex(uuid.subspan(6, 2)),
                       hex(uuid.subspan(8, 2)), hex(uuid.subspan(10, 6)));
}

std::string utf16_text(std::span<const std::byte> text, bool big_endian) {
    const auto unit = [&](std::size_t i) -> std::uint32_t {
        if (2 * i + 2 > text.size()) return 0;
        return big_endian ? load_be<std::uint16_t>(text, 2 * i) : load_le<std::uint16_t>(text, 2 * i);
    };
    constexpr std::uint32_t replacement = 0xfffd;
    std::string result;
    for (std::size_t i = 0; unit(i) != 0; ++i) {
        std::uint32_t code = unit(i);
        if (code >= 0xd800 && code < 0xdc00 && unit(i + 1) >= 0xdc00 && unit(i + 1) < 0xe000) {
            code = 0x10000 + ((code - 0xd800) << 10) + (unit(++i) - 0xdc00);
        } else if (code >= 0xd800 && code < 0xe000) {
            code = replacement;
        }
        append_utf8(result, code);
    }
    return result;
}

std::optional<std::u16string> utf16(std::string_view text) {
    std::u16string result;
    for (std::size_t i = 0; i < text.size();) {
        const auto first = static_cast<std::uint8_t>(text[i]);
        const std::size_t length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
        if ((first >= 0x80 && first < 0xc2) || first > 0xf4 || i + length > text.size()) return {};
        std::uint32_t value = length == 1 ? first : first & (0x7fU >> length);
        for (std::size_t k = 1; k < length; ++k) {
            const auto next = static_cast<std::uint8_t>(text[i + k]);
            if ((next & 0xc0) != 0x80) return {};
            value = value << 6 | (next & 0x3f);
        }
        constexpr std::array<std::uint32_t, 5> least = {0, 0, 0x80, 0x800, 0x10000};
        if (value < least[length] || value > 0x10ffff || (value >= 0xd800 && value < 0xe000)) return {};
        if (value >= 0x10000) {
            result += static_cast<char16_t>(0xd800 + ((value - 0x10000) >> 10));
            result += static_cast<char16_t>(0xdc00 + ((value - 0x10000) & 0x3ff));
        } else {
            result += static_cast<char16_t>(value);
        }
        i += length;
    }
    return result;
}

}  // namespace qcow
