// qcow write: copies standard input into the virtual disk.

#include <fmt/format.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "command.h"

namespace tool {
namespace {

struct WriteOptions {
    Target target;
    std::string offset;
};

/// Returns fewer bytes at the end of standard input, and after a request to stop.
qcow::Result<std::size_t> read_input(std::span<std::byte> to, const std::stop_token& stop) {
    constexpr int interval = 50;  // milliseconds
    std::size_t done = 0;
    while (done < to.size() && !stop.stop_requested()) {
        pollfd input = {.fd = STDIN_FILENO, .events = POLLIN, .revents = 0};
        if (poll(&input, 1, interval) == 0) continue;
        const auto n = ::read(STDIN_FILENO, to.data() + done, to.size() - done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return std::unexpected(qcow::Error{qcow::Errc::io, "standard input", std::strerror(errno)});
        if (n == 0) break;
        done += static_cast<std::size_t>(n);
    }
    return done;
}

/// Returns the number of bytes left in standard input, if it is a regular file.
std::optional<std::uint64_t> input_length() {
    struct stat status = {};
    if (fstat(STDIN_FILENO, &status) != 0 || !S_ISREG(status.st_mode)) return std::nullopt;
    const auto at = lseek(STDIN_FILENO, 0, SEEK_CUR);
    if (at < 0) return std::nullopt;
    return static_cast<std::uint64_t>(std::max<off_t>(0, status.st_size - at));
}

qcow::Result<void> write_input(qcow::Image& image, const WriteOptions& options, const std::stop_token& stop) {
    const std::uint64_t begin = parse_size(options.offset);
    if (auto fits = verify_range(image, options.target.path, begin, input_length().value_or(0)); !fits) return fits;
    std::vector<std::byte> buffer(std::size_t{1} << 20);
    for (qcow::GuestOffset at{begin};;) {
        const auto length = read_input(buffer, stop);
        if (!length) return std::unexpected(length.error());
        if (*length > image.size() - at.value) {
            return std::unexpected(qcow::Error{
                qcow::Errc::invalid_argument, options.target.path,
                fmt::format("standard input reaches past the end of the disk ({} bytes); {} bytes have been written",
                            image.size(), at.value - begin)});
        }
        if (*length == 0) return {};
        if (auto done = image.write(at, std::span(buffer).first(*length)); !done) return done;
        at += *length;
    }
}

}  // namespace

void declare_write(CLI::App& root, int& status) {
    const auto options = std::make_shared<WriteOptions>();
    auto& app = declare(
        root, status, "write", "Write bytes into the virtual disk",
        "Reads the bytes from standard input, up to its end. The command fails if they do not fit into the disk:\n"
        "with a file before it writes anything, with a pipe when the end is reached.\n"
        "Examples:\n"
        "  qcow write disk.qcow2 0 < boot-sector\n"
        "  qcow read old.qcow2 1M 100M | qcow write new.qcow2 1M",
        [options]() -> qcow::Result<int> {
            qcow::FilesInUse in_use;
            auto added = in_use.add(qcow::FilesInUse::Use::read, "/dev/stdin", "standard input");
            QCOW_TRY_VOID(added);
            QCOW_TRY_VOID(
                in_use.add_unopened(qcow::FilesInUse::Use::written, QCOW_TRY(spec_of(options->target)), "the image"));
            return change(options->target, [&](qcow::Image& image, const std::stop_token& stop) {
                return write_input(image, *options, stop);
            });
        });
    add_target_options(app, options->target);
    app.add_option("OFFSET", options->offset, "First byte, as an offset in the virtual disk")
        ->required()
        ->check(size_text);
}

}  // namespace tool
