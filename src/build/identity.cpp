#include "build/identity.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <ranges>

#include "base/within_memory.h"
#include "qcow/text.h"

namespace qcow {
namespace {

constexpr std::uint64_t mixed(std::uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

std::uint64_t hash(std::uint64_t state, std::string_view text) {
    for (const char c : text) state = mixed(state ^ static_cast<std::uint8_t>(c)) + 0x9e3779b97f4a7c15;
    return mixed(state ^ text.size());
}

std::string described(const FilesystemSpec& filesystem) {
    return fmt::format("{}:{}:{};", static_cast<unsigned>(filesystem.type), filesystem.label.size(), filesystem.label);
}

struct NamedType {
    std::string_view name;
    std::string_view guid;  // empty: GPT has no such type
    int mbr;                // negative: MBR has no such type
};

// Where a GUID or a byte is in several lines, the first one is what it stands for in the other table.
constexpr auto types = std::to_array<NamedType>({
    {"esp", "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", 0xef},
    {"efi", "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", 0xef},
    {"efi-system", "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", 0xef},
    {"linux", "0fc63daf-8483-4772-8e79-3d69d8477de4", 0x83},
    {"linux-filesystem", "0fc63daf-8483-4772-8e79-3d69d8477de4", 0x83},
    {"swap", "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f", 0x82},
    {"linux-swap", "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f", 0x82},
    {"bios-boot", "21686148-6449-6e6f-744e-656564454649", -1},
    {"bios", "21686148-6449-6e6f-744e-656564454649", -1},
    {"xbootldr", "bc13c2ff-59e6-4262-a352-b275fd6f7172", 0xea},
    {"linux-root-x86-64", "4f68bce3-e8cd-4db1-96e7-fbcaf984b709", 0x83},
    {"linux-root-x86", "44479540-f297-41b2-9af7-d131d5f0458a", 0x83},
    {"linux-root-arm64", "b921b045-1df0-41c3-af44-4c6f280d3fae", 0x83},
    {"linux-root-arm", "69dad710-2ce4-4e3c-b16c-21a1d49abed3", 0x83},
    {"linux-root-riscv64", "72ec70a6-cf74-40e6-bd49-4bda08e8f224", 0x83},
    {"linux-usr-x86-64", "8484680c-9521-48c6-9c11-b0720656f69e", 0x83},
    {"linux-home", "933ac7e1-2eb4-4f13-b844-0e14e2aef915", 0x83},
    {"linux-srv", "3b8f8425-20e0-4f3b-907f-1a25a76f98e8", 0x83},
    {"linux-var", "4d21b016-b534-45c2-a9fb-5c16e091fd2d", 0x83},
    {"linux-lvm", "e6d6d379-f507-44c2-a23c-238f2a3df928", 0x8e},
    {"linux-raid", "a19d880f-05fc-4d3b-a006-743f0f84911e", 0xfd},
    {"linux-luks", "ca7d7ccb-63ed-4c53-861c-1742536059cc", -1},
    {"fat", "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", 0x0c},
    {"fat32", "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", 0x0c},
    {"fat16", "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", 0x0e},
    {"msdata", "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", 0x07},
    {"basic-data", "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", 0x07},
    {"microsoft-basic-data", "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", 0x07},
});

PartitionType type_of(const NamedType& type) {
    PartitionType result;
    if (!type.guid.empty()) result.guid = parse_uuid(type.guid);
    if (type.mbr >= 0) result.mbr = static_cast<std::uint8_t>(type.mbr);
    return result;
}

std::optional<unsigned> hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return {};
}

Result<PartitionType> parse_type(std::string_view text) {
    if (const auto named = std::ranges::find(types, text, &NamedType::name); named != types.end())
        return type_of(*named);
    const auto unused = [&] {
        return fail(Errc::invalid_argument, "partition type",
                    fmt::format("is \"{}\", which marks an entry of the table that is not used", printable(text, 64)));
    };
    if (const auto guid = parse_uuid(text)) {
        if (*guid == Uuid{}) return unused();
        const auto known = std::ranges::find(types, uuid_text(*guid), &NamedType::guid);
        return known != types.end() ? type_of(*known) : PartitionType{.guid = guid};
    }
    if (text.size() == 4 && text.starts_with("0x")) {
        const auto high = hex_digit(text[2]);
        const auto low = hex_digit(text[3]);
        if (high && low) {
            const auto byte = static_cast<std::uint8_t>(*high * 16 + *low);
            if (byte == 0) return unused();
            const auto known = std::ranges::find(types, int{byte}, &NamedType::mbr);
            return known != types.end() ? type_of(*known) : PartitionType{.mbr = byte};
        }
    }
    std::vector<std::string> names;
    names.reserve(std::size(types));
    for (const auto& type : types) names.emplace_back(type.name);
    return fail(Errc::invalid_argument, "partition type",
                fmt::format("is \"{}\", and must be a name such as esp or linux, a GUID, or a byte such as 0x83{}",
                            printable(text, 64), did_you_mean(text, names)));
}

}  // namespace

std::string uuid_text(const Uuid& uuid) {
    std::string text;
    for (std::size_t i = 0; i < uuid.size(); ++i)
        text += fmt::format("{}{:02x}", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", uuid[i]);
    return text;
}

std::optional<Uuid> parse_uuid(std::string_view text) {
    if (text.size() != 36) return {};
    Uuid uuid;
    std::size_t digits = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (i == 8 || i == 13 || i == 18 || i == 23) {
            if (text[i] != '-') return {};
            continue;
        }
        const auto digit = hex_digit(text[i]);
        if (!digit) return {};
        auto& byte = uuid[digits++ / 2];
        byte = static_cast<std::uint8_t>(byte << 4 | *digit);
    }
    return uuid;
}

Result<PartitionType> parse_partition_type(std::string_view text) {
    return within_memory([&] { return parse_type(text); });
}

Uuid derived_uuid(std::string_view seed, std::string_view purpose) {
    Uuid uuid;
    for (unsigned half = 0; half < 2; ++half) {
        const auto value = hash(hash(half + 1, seed), purpose);
        for (unsigned i = 0; i < 8; ++i) uuid[half * 8 + i] = static_cast<std::uint8_t>(value >> (8 * i));
    }
    uuid[6] = static_cast<std::uint8_t>(0x80 | (uuid[6] & 0x0f));  // version
    uuid[8] = static_cast<std::uint8_t>(0x80 | (uuid[8] & 0x3f));  // variant
    return uuid;
}

void FilesHash::add(std::string_view text) { state_ = hash(state_, text); }

void FilesHash::add(std::uint64_t number) { state_ = mixed(state_ ^ number) + 0x9e3779b97f4a7c15; }

void FilesHash::add(const TreeInode& inode, bool is_root) {
    add(std::uint64_t{inode.mode});
    add(std::uint64_t{inode.uid} << 32 | inode.gid);
    add(static_cast<std::uint64_t>(inode.mtime));
    add(inode.nanoseconds);
    add(inode.size);
    if (inode.rare) {
        add(inode.rare->target);
        for (const auto& [name, value] : inode.rare->xattrs) {
            add(name);
            add(value);
        }
    }
    if (!inode.is_directory()) return;
    for (const auto& entry : inode.children->entries()) {
        if (is_root && entry.name.text() == "lost+found") continue;  // ext makes it
        add(entry.name.text());
        add(*entry.inode, false);
    }
    add(std::string_view());
}

std::string seed_of(const BuildSpec& spec) {
    if (!spec.seed.empty()) return spec.seed;
    auto seed = fmt::format("{};", static_cast<unsigned>(spec.table));
    if (spec.filesystem) seed += described(*spec.filesystem);
    for (const auto& partition : spec.partitions) {
        seed += fmt::format("{}:{}:{};", partition.name.size(), partition.name,
                            partition.type.guid ? uuid_text(*partition.type.guid) : "");
        if (partition.filesystem) seed += described(*partition.filesystem);
    }
    return seed;
}

}  // namespace qcow
