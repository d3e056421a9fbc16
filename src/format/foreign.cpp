#include "format/foreign.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/bits.h"
#include "format/file_name.h"

namespace qcow::format {
namespace {

using namespace std::string_view_literals;

struct Signature {
    enum class Place : std::uint8_t { head, tail };
    Place place = Place::head;
    std::size_t at = 0;      // bytes from the beginning, or before the end
    std::string_view bytes;  // '?' stands for any
    std::string_view what;
    std::string_view remedy;  // {file}; {image} and {unpacked} are files to make of it
};

constexpr auto head = Signature::Place::head;
constexpr auto tail = Signature::Place::tail;

constexpr auto vmdk = "a VMDK image (VMware)"sv;
constexpr auto from_vmdk = "convert it with qemu-img convert -f vmdk -O qcow2 {file} {image}"sv;
constexpr auto vhd = "a VHD image (Virtual PC, Hyper-V)"sv;
constexpr auto from_vhd = "convert it with qemu-img convert -f vpc -O qcow2 {file} {image}"sv;
constexpr auto from_parallels = "convert it with qemu-img convert -f parallels -O qcow2 {file} {image}"sv;
constexpr auto from_luks = "the format luks and its key give what it holds"sv;

constexpr std::array signatures = {
    Signature{head, 0, "KDMV?\0\0\0"sv, vmdk, from_vmdk},
    Signature{head, 0, "COWD?\0\0\0"sv, vmdk, from_vmdk},
    Signature{head, 0, "\xbe\xba\xfe\xca\0\0\0\0"sv, vmdk, from_vmdk},
    Signature{head, 0, "# Disk DescriptorFile"sv,
              "the descriptor of a VMDK image (VMware), whose data lie in other files", from_vmdk},
    Signature{head, 0, "conectix????\0\1\0\0"sv, vhd, from_vhd},
    Signature{tail, 512, "conectix????\0\1\0\0"sv, vhd, from_vhd},
    Signature{tail, 511, "conectix????\0\1\0\0"sv, vhd, from_vhd},
    Signature{head, 0, "vhdxfile"sv, "a VHDX image (Hyper-V)",
              "convert it with qemu-img convert -f vhdx -O qcow2 {file} {image}"},
    Signature{head, 64, "\x7f\x10\xda\xbe"sv, "a VDI image (VirtualBox)",
              "convert it with qemu-img convert -f vdi -O qcow2 {file} {image}"},
    Signature{head, 0, "QED\0"sv, "a QED image", "convert it with qemu-img convert -f qed -O qcow2 {file} {image}"},
    Signature{head, 0, "WithoutFreeSpace"sv, "a Parallels image", from_parallels},
    Signature{head, 0, "WithouFreSpacExt"sv, "a Parallels image", from_parallels},
    Signature{head, 0, "Bochs Virtual HD Image"sv, "a Bochs image",
              "convert it with qemu-img convert -f bochs -O qcow2 {file} {image}"},
    Signature{tail, 512, "koly\0\0\0\4\0\0\2\0"sv, "a DMG image (macOS)",
              "convert it with qemu-img convert -f dmg -O qcow2 {file} {image}"},
    Signature{head, 0, "LUKS\xba\xbe\0\1"sv, "an encrypted volume (LUKS1)", from_luks},
    Signature{head, 0, "LUKS\xba\xbe\0\2"sv, "an encrypted volume (LUKS2)", from_luks},
    Signature{head, 0, "\x3a\xff\x26\xed\1\0"sv, "an Android sparse image",
              "unpack it with simg2img {file} {unpacked}"},
    Signature{head, 0, "VMA\0\0\0\0\1"sv, "a VMA backup (Proxmox)", "unpack it with vma extract {file} DIRECTORY"},
    Signature{head, 0, "EVF\x09\x0d\x0a\xff\0"sv, "an EWF image (EnCase)",
              "export it as a raw disk with ewfexport {file}"},
    Signature{head, 0, "\x1f\x8b\x08"sv, "a gzip file", "unpack it with gunzip -c {file} > {unpacked}"},
    Signature{head, 0,
              "\xfd"
              "7zXZ\0"sv,
              "an xz file", "unpack it with xz -dc {file} > {unpacked}"},
    Signature{head, 0, "\x28\xb5\x2f\xfd"sv, "a zstd file", "unpack it with zstd -dc {file} > {unpacked}"},
    Signature{head, 0, "\x04\x22\x4d\x18"sv, "an lz4 file", "unpack it with lz4 -dc {file} > {unpacked}"},
    Signature{head, 0, "BZh?1AY&SY"sv, "a bzip2 file", "unpack it with bunzip2 -c {file} > {unpacked}"},
    Signature{head, 0, "7z\xbc\xaf\x27\x1c"sv, "a 7z archive",
              "unpack it with 7z x {file}, or look into it with qcow ls -f raw {file}"},
    Signature{head, 0, "version https://git-lfs.github.com/spec/"sv, "a Git LFS pointer, which stands for the image",
              "fetch the image itself with git lfs pull"},
};

bool is_at(std::string_view bytes, std::size_t at, std::string_view wanted) {
    if (at > bytes.size() || bytes.size() - at < wanted.size()) return false;
    return std::ranges::equal(bytes.substr(at, wanted.size()), wanted,
                              [](char there, char want) { return want == '?' || there == want; });
}

bool matches(const Signature& signature, std::string_view start, std::string_view end) {
    if (signature.place == head) return is_at(start, signature.at, signature.bytes);
    return end.size() >= signature.at && is_at(end, end.size() - signature.at, signature.bytes);
}

std::string lower(std::string_view word) {
    std::string result(word);
    for (char& c : result) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    return result;
}

bool ends_in(std::string_view path, std::string_view suffix) { return lower(path).ends_with(suffix); }

bool has_boot_signature(std::string_view start) { return is_at(start, 510, "\x55\xaa"); }

/// Each of a boot record's four partitions can be booted from or not. This tells one from data that just have the
/// signature there.
bool has_partition_table(std::string_view start) {
    if (!has_boot_signature(start)) return false;
    return std::ranges::all_of(std::array{446, 462, 478, 494}, [&](int at) {
        const char status = start[static_cast<std::size_t>(at)];
        return status == '\0' || status == '\x80';
    });
}

/// What a server sends instead of an image, or what somebody took for one.
std::optional<Foreign> recognise_page(std::string_view start) {
    constexpr auto download = "if it was downloaded, the server sent it instead of an image: download the image again";
    if (start.starts_with("\xef\xbb\xbf")) start.remove_prefix(3);
    start.remove_prefix(std::min(start.find_first_not_of(" \t\r\n"), start.size()));
    const auto word = lower(start.substr(0, 16));
    if (word.starts_with("<!doctype html") || word.starts_with("<html") || word.starts_with("<head"))
        return Foreign{"a web page (HTML)", download};
    if (word.starts_with("<?xml") || word.starts_with("<error>")) return Foreign{"an XML document", download};
    return std::nullopt;
}

/// Whether the bytes end with the record that ends every zip file, and its comment.
bool ends_as_zip(std::string_view end) {
    constexpr std::size_t record_bytes = 22;
    for (std::size_t at = 0; at + record_bytes <= end.size(); ++at) {
        if (!is_at(end, at, "PK\5\6")) continue;
        const auto comment = static_cast<unsigned char>(end[at + 20]) + 256U * static_cast<unsigned char>(end[at + 21]);
        if (at + record_bytes + comment == end.size()) return true;
    }
    return false;
}

/// Archives whose signature alone says too little: disks are used as tapes.
std::optional<Foreign> recognise_archive(std::string_view start, std::string_view end, std::string_view path) {
    const auto file = shell_word(path);
    const auto look = ", or look into it with qcow ls -f raw " + file;
    if (is_at(start, 0, "PK\3\4") && ends_as_zip(end))
        return Foreign{"a zip archive", "unpack it with unzip " + file + look};
    if (!is_at(start, 257, "ustar")) return std::nullopt;
    if (ends_in(path, ".ova")) return Foreign{"a package of a virtual machine (OVA)", "unpack it with tar -xf " + file};
    if (ends_in(path, ".tar")) return Foreign{"a tar archive", "unpack it with tar -xf " + file + look};
    return std::nullopt;
}

/// The path without its last extension, if it is one of these.
std::string without_extension(std::string_view path, std::string_view extensions) {
    const auto dot = path.rfind('.');
    if (dot == std::string_view::npos || dot == 0 || path.find('/', dot) != std::string_view::npos)
        return std::string(path);
    const auto extension = lower(path.substr(dot));
    const bool known = extensions.empty() || extensions.find(extension + ' ') != std::string_view::npos;
    return std::string(known ? path.substr(0, dot) : path);
}

std::string remedy_for(std::string_view remedy, std::string_view path) {
    auto image = without_extension(path, {}) + ".qcow2";
    if (image == path) image = without_extension(path, {}) + ".converted.qcow2";
    auto unpacked = without_extension(path, ".gz .xz .zst .lz4 .bz2 .simg ");
    if (unpacked == path) unpacked += ".unpacked";
    return fmt::format(fmt::runtime(remedy), fmt::arg("file", shell_word(path)), fmt::arg("image", shell_word(image)),
                       fmt::arg("unpacked", shell_word(unpacked)));
}

}  // namespace

std::optional<Foreign> recognise_foreign(std::span<const std::byte> head_bytes, std::span<const std::byte> tail_bytes,
                                         std::string_view path) {
    const auto start = as_text(head_bytes);
    const auto end = as_text(tail_bytes);
    const bool boots = has_partition_table(start);
    for (const auto& signature : signatures) {
        if (boots && signature.place == head) continue;
        if (matches(signature, start, end)) return Foreign{signature.what, remedy_for(signature.remedy, path)};
    }
    if (boots) return std::nullopt;
    if (auto page = recognise_page(start)) return page;
    return recognise_archive(start, end, path);
}

bool looks_raw(std::span<const std::byte> head_bytes) {
    const auto start = as_text(head_bytes);
    return is_zero(head_bytes) || has_boot_signature(start) || is_at(start, 512, "EFI PART") ||
           is_at(start, 0x438, "\x53\xef") || is_at(start, 0, "XFSB") || is_at(start, 512, "LABELONE");
}

bool promises_qcow2(std::string_view path) { return ends_in(path, ".qcow2"); }

}  // namespace qcow::format
