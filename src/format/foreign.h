#pragma once
// Files that are no raw disks, although they are no images of a format that is read here either: told by signatures.

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace qcow::format {

/// How much of a file recognise_foreign wants to see: its first and its last bytes, or as many as there are.
inline constexpr std::size_t foreign_head_bytes = 4096;
inline constexpr std::size_t foreign_tail_bytes = 512;

struct Foreign {
    std::string_view what;  // "a VMDK image (VMware)"
    std::string remedy;     // how its user gets on, a clause of a sentence
};

/// What a file is that begins and ends so, if it is certainly no raw disk, or is one only in the second place (a LUKS
/// volume is the raw disk of somebody who has the key). What begins with a boot record is a raw disk, unless it ends as
/// something else. `path` is what the remedy's command is about.
std::optional<Foreign> recognise_foreign(std::span<const std::byte> head, std::span<const std::byte> tail,
                                         std::string_view path);

/// Whether a raw disk may well begin so: with zeros or nothing, a boot record, a partition table or a file system.
bool looks_raw(std::span<const std::byte> head);

/// Whether a name promises a qcow2 image.
bool promises_qcow2(std::string_view path);

}  // namespace qcow::format
