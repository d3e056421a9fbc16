#include "qemu_words.h"

#include <algorithm>
#include <array>

namespace tool {
namespace {

constexpr auto commands = std::to_array<QemuWord>({
    {"", "bench", "qemu-img bench does that"},
    {"", "dd",
     "qcow read IMAGE OFFSET LENGTH > FILE and qcow write IMAGE OFFSET < FILE copy a part, "
     "and qcow convert copies all"},
    {"", "io aio_read readv", "qcow read IMAGE OFFSET LENGTH reads, and qcow write IMAGE OFFSET < FILE writes"},
    {"", "aio_write writev", "qcow write IMAGE OFFSET < FILE does that"},
    {"", "alloc", "qcow map IMAGE shows what is allocated"},
    {"", "length", "qcow info IMAGE shows the size"},
    {"", "truncate", "qcow resize IMAGE SIZE does that"},
    {"", "flush aio_flush", "each command that writes flushes before it ends"},
    {"", "nbd", "qcow serve IMAGE serves it over NBD"},
});

constexpr auto options = std::to_array<QemuWord>({
    {"", "--target-image-opts", "name the file, give its format with -O, and its key with --object or --key"},
    {"", "-T --trace", "leave it out"},
    {"", "-q --quiet", "leave it out, or add > /dev/null: errors still show"},
    {"check", "-T --cache", "leave it out: images are read through the page cache"},
    {"compare", "-T --cache", "leave it out: images are read through the page cache"},
    {"compare", "--a-format", "use -f"},
    {"compare", "--b-format", "use -F"},
    {"convert", "--source-image-opts", "use --image-opts"},
    {"convert", "--source-format", "use -f"},
    {"convert", "--source-snapshot", "use -l"},
    {"convert", "--sparse-size", "use -S"},
    {"convert", "--target-cache", "use -t"},
    {"convert", "--target-options", "use -o"},
    {"convert", "--parallel", "use -m"},
    {"convert", "-C --copy-range-offloading", "leave it out: the file system shares or copies the data if it can"},
    {"convert", "-W --oob-writes", "leave it out: a copy uses all processors, and -m sets another number"},
    {"convert", "-r --rate", "leave it out, or use qemu-img convert -r RATE"},
    {"convert", "-T --source-cache", "leave it out: sources are read through the page cache"},
    {"create", "-e", "use -o encrypt.format=luks"},
    {"create", "--backing-unsafe", "use -u"},
    {"info", "-b", "use --backing-chain"},
    {"map", "-s --start-offset --max-length", "leave it out: qcow map shows the whole disk"},
    {"measure", "-s", "use --size"},
    {"measure", "--target-options", "use -o"},
    {"resize", "--preallocation", "qemu-img resize --preallocation=MODE IMAGE SIZE does that"},
    {"read", "-P", "compare with a file: qcow read IMAGE OFFSET LENGTH | cmp - FILE"},
    {"read", "-v", "use --hex"},
    {"write", "-P -s", "the bytes come from standard input: qcow write IMAGE OFFSET < FILE"},
    {"write", "-z", "qcow zero IMAGE OFFSET LENGTH does that"},
    {"write", "-c", "qcow convert -c compresses a whole image"},
    {"amend", "-p --progress", "leave it out: changing options takes no longer than qcow check"},
    {"commit", "--drop", "use -d, which leaves the image as it is"},
    {"commit", "-r --rate", "leave it out, or use qemu-img commit -r RATE"},
    {"rebase", "--backing-unsafe", "use -u"},
    {"rebase", "-U --force-share", "leave it out: the image is written, so nobody else may use it"},
    {"rebase", "-T --backing-cache", "leave it out: qcow reads backing files through the cache of the system"},
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
    {"-o", "encryption", "use encrypt.format=luks"},
    {"-o", "nolazy_refcounts noextended_l2 nodata_file_raw", "use NAME=off"},
    {"-o", "nocow", "chattr +C on the directory does that"},
    {"-o", "extent_size_hint", "xfs_io -c 'extsize SIZE' on the directory does that"},
});

constexpr auto values = std::to_array<QemuWord>({
    {"", "bochs cloop dmg parallels qcow qed vdi vhdx vmdk vpc", "qemu-img convert supports that format"},
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
