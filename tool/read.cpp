// qcow read: prints guest bytes.

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "command.h"
#include "qcow/stream.h"

namespace tool {
namespace {

struct ReadOptions {
    Source source;
    std::string offset;
    std::string length;
    bool hex = false;
};

/// "00000010  51 46 49 fb ...  |QFI.|": sixteen bytes per line.
void print_hex(std::uint64_t at, std::span<const std::byte> bytes) {
    for (std::size_t i = 0; i < bytes.size(); i += 16) {
        const auto line = bytes.subspan(i, std::min<std::size_t>(16, bytes.size() - i));
        std::string digits;
        std::string text;
        for (std::size_t k = 0; k < 16; ++k) {
            if (k == 8) digits += ' ';
            if (k >= line.size()) {
                digits += "   ";
                continue;
            }
            const auto byte = static_cast<std::uint8_t>(line[k]);
            digits += fmt::format(" {:02x}", byte);
            text += byte >= 0x20 && byte < 0x7f ? static_cast<char>(byte) : '.';
        }
        fmt::print("{:08x} {}  |{}|\n", at + i, digits, text);
    }
}

qcow::Result<void> print_hex(qcow::Disk& disk, qcow::GuestOffset at, std::uint64_t length) {
    std::vector<std::byte> buffer(std::min<std::uint64_t>(std::uint64_t{1} << 20, length));
    while (length > 0) {
        const auto part = std::span(buffer).first(std::min<std::uint64_t>(buffer.size(), length));
        if (auto done = disk.read(at, part); !done) return done;
        print_hex(at.value, part);
        at += part.size();
        length -= part.size();
    }
    return {};
}

qcow::Result<int> run(const ReadOptions& options) {
    auto image = open_source(options.source);
    if (!image) return std::unexpected(std::move(image).error());
    auto disk = disk_of(*image, options.source);
    if (!disk) return std::unexpected(std::move(disk).error());

    const std::uint64_t length = parse_size(options.length);
    const qcow::GuestOffset at{parse_size(options.offset)};
    // Before the first bytes are printed.
    if (auto fits = verify_range(**disk, options.source.path, at.value, length); !fits) {
        return std::unexpected(std::move(fits).error());
    }
    qcow::FilesInUse in_use;
    using enum qcow::FilesInUse::Use;
    QCOW_TRY_VOID(in_use.add(read, **image, QCOW_TRY(spec_of(options.source)), "the image"));
    QCOW_TRY_VOID(in_use.add(written, "/dev/stdout", "standard output"));
    auto done = options.hex ? print_hex(**disk, at, length)
                            : qcow::copy_to_stream(**disk, {at, length}, STDOUT_FILENO, "standard output");
    if (!done) return std::unexpected(std::move(done).error());
    return ok;
}

}  // namespace

void declare_read(CLI::App& root, int& status) {
    const auto options = std::make_shared<ReadOptions>();
    auto& app = declare(root, status, "read", "Print bytes of the virtual disk",
                        "Prints the bytes to standard output unchanged, or with --hex as a dump.\n"
                        "Examples:\n"
                        "  qcow read --hex disk.qcow2 0 512          the boot sector\n"
                        "  qcow read disk.qcow2 1M 100M | sha256sum  the SHA-256 digest of a part",
                        [options] { return run(*options); });
    add_source_options(app, options->source);
    app.add_option("OFFSET", options->offset, "First byte, as an offset in the virtual disk")
        ->required()
        ->check(size_text);
    app.add_option("LENGTH", options->length, "Number of bytes")->required()->check(size_text);
    add_snapshot_option(app, options->source, "Read this internal snapshot (id or name)");
    app.add_flag("--hex", options->hex, "Print offset, hexadecimal bytes and text");
}

}  // namespace tool
