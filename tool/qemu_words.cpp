#include "qemu_words.h"

#include <algorithm>
#include <array>

namespace tool {
namespace {

constexpr auto commands = std::to_array<QemuWord>({
    {"", "amend",
     "qemu-img amend -f qcow2 -o OPTIONS IMAGE changes the image, "
     "and qcow convert -O qcow2 -o OPTIONS IMAGE NEW makes a new one"},
    {"", "bench", "qemu-img bench does that"},
    {"", "bitmap", "qemu-img bitmap does that, and qcow info IMAGE lists the bitmaps"},
    {"", "commit",
     "qemu-img commit -f qcow2 OVERLAY does that, and qcow convert -O qcow2 OVERLAY NEW makes one image of the chain"},
    {"", "dd",
     "qcow read IMAGE OFFSET LENGTH > FILE and qcow write IMAGE OFFSET < FILE copy a part, "
     "and qcow convert copies all"},
    {"", "measure", "qemu-img measure -O qcow2 IMAGE does that, and qcow info --usage IMAGE shows what is stored now"},
    {"", "io aio_read readv", "qcow read IMAGE OFFSET LENGTH reads, and qcow write IMAGE OFFSET < FILE writes"},
    {"", "aio_write writev", "qcow write IMAGE OFFSET < FILE does that"},
    {"", "alloc", "qcow map IMAGE shows what is allocated"},
    {"", "length", "qcow info IMAGE shows the size"},
    {"", "truncate", "qcow resize IMAGE SIZE does that"},
    {"", "flush aio_flush", "each command that writes flushes before it ends"},
    {"", "nbd", "qcow serve IMAGE serves it over NBD"},
});

constexpr auto options = std::to_array<QemuWord>({
    {"", "--object", "it passes secrets for encrypted images and connections, which only QEMU's tools open"},
    {"", "--image-opts --target-image-opts", "name the file, and give its format with -f"},
    {"", "-T --trace", "leave it out"},
    {"", "-q --quiet", "leave it out, or add > /dev/null: errors still show"},
    {"", "--output", "use --json instead of --output=json; without it, the output is text"},
    {"check", "-T", "leave it out"},
    {"convert", "-C", "leave it out: the file system shares or copies the data if it can"},
    {"convert", "-W", "leave it out: a copy uses all processors, and -m sets another number"},
    {"convert", "-r", "leave it out, or use qemu-img convert -r RATE"},
    {"convert", "-t", "with -n, use --cache MODE (a new file is flushed once, at the end)"},
    {"convert", "-T", "leave it out: sources are read through the page cache"},
    {"convert", "--bitmaps --skip-broken-bitmaps", "qemu-img convert --bitmaps copies the bitmaps, too"},
    {"create", "-e", "qemu-img create -o encrypt.format=luks,... makes encrypted images"},
    {"map", "-s --start-offset --max-length", "leave it out: qcow map shows the whole disk"},
    {"resize", "--preallocation", "qemu-img resize --preallocation=MODE IMAGE SIZE does that"},
    {"read", "-P", "compare with a file: qcow read IMAGE OFFSET LENGTH | cmp - FILE"},
    {"read", "-v", "use --hex"},
    {"write", "-P -s", "the bytes come from standard input: qcow write IMAGE OFFSET < FILE"},
    {"write", "-z", "qcow zero IMAGE OFFSET LENGTH does that"},
    {"write", "-c", "qcow convert -c compresses a whole image"},
    {"resize", "-t", "use --cache MODE"},
    {"rebase", "-t", "use --cache MODE"},
    {"rebase", "-T", "leave it out: qcow reads backing files through the cache of the system"},
    {"write", "-t", "use --cache MODE"},
    {"zero", "-t", "use --cache MODE"},
    {"discard", "-t", "use --cache MODE"},
    {"write", "-n --nocache", "use --cache none"},
    {"serve", "-n --nocache", "use --cache none"},
    {"", "-i --aio", "leave it out"},
    {"serve", "-c --connect",
     "nbd-client connects a device of the kernel to a server: nbd-client -unix SOCKET /dev/nbd0"},
    {"serve", "-d --disconnect", "nbd-client -d /dev/nbd0 does that"},
    {"serve", "-L --list", "nbdinfo --list URI does that"},
    {"serve", "-o --offset", "leave it out: qcow serves the whole disk, and the client selects the part"},
    {"serve", "-v --verbose", "leave it out"},
    {"serve", "-s",
     "make an overlay with qcow create -b IMAGE -F FORMAT OVERLAY, and serve that, or serve an internal snapshot with "
     "-l"},
    {"serve", "--load-snapshot", "use --snapshot NAME"},
    {"serve", "--shared", "use --connections NUMBER"},
    {"serve", "--detect-zeroes", "leave it out: zeros are written like other data"},
    {"serve", "--fork", "start it with & or as a service; the file of --pid-file appears when clients can connect"},
    {"serve", "--selinux-label", "label the directory of the socket"},
    {"serve", "--tls-creds", "use --tls-certificates DIRECTORY or --tls-psk FILE"},
    {"serve", "--tls-authz --tls-hostname", "--tls-verify-peer accepts only clients with a certificate of the same CA"},
    {"-o", "encryption encrypt.format encrypt.key-secret", "qemu-img create makes encrypted images"},
    {"-o", "nolazy_refcounts noextended_l2 nodata_file_raw", "use NAME=off"},
    {"-o", "nocow", "chattr +C on the directory does that"},
    {"-o", "extent_size_hint", "xfs_io -c 'extsize SIZE' on the directory does that"},
});

constexpr auto values = std::to_array<QemuWord>({
    {"", "bochs cloop dmg luks parallels qcow qed vdi vhdx vmdk vpc", "qemu-img convert supports that format"},
    {"", "directsync", "use writethrough, which is as durable, or none, which bypasses the page cache"},
});

std::optional<std::string_view> find(std::span<const QemuWord> table, std::string_view command, std::string_view word) {
    for (const auto& entry : table) {
        if (entry.command != command) continue;
        for (auto rest = entry.words; !rest.empty();) {
            const auto end = std::min(rest.find(' '), rest.size());
            if (rest.substr(0, end) == word) return entry.instead;
            rest.remove_prefix(std::min(end + 1, rest.size()));
        }
    }
    return std::nullopt;
}

}  // namespace

std::span<const QemuWord> qemu_commands() { return commands; }
std::span<const QemuWord> qemu_options() { return options; }
std::span<const QemuWord> qemu_values() { return values; }

std::optional<std::string_view> qemu_command(std::string_view name) { return find(commands, "", name); }

std::optional<std::string_view> qemu_option(std::string_view command, std::string_view option) {
    const auto of_command = find(options, command, option);
    return of_command ? of_command : find(options, "", option);
}

std::optional<std::string_view> qemu_value(std::string_view value) { return find(values, "", value); }

}  // namespace tool
