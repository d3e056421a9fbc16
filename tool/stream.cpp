#include "stream.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <vector>

namespace tool {
namespace {

bool is_standard_output(const std::string& path) {
    constexpr std::array names = {"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"};
    return std::ranges::find(names, path) != names.end();
}

std::unexpected<qcow::Error> cannot(const char* what, const std::string& name) {
    return std::unexpected(qcow::Error{errno == ENOSPC || errno == EFBIG ? qcow::Errc::no_space : qcow::Errc::io, name,
                                       std::string(what) + ": " + std::strerror(errno)});
}

}  // namespace

bool is_stream(const std::string& path) {
    struct stat status = {};
    return is_standard_output(path) ||
           (stat(path.c_str(), &status) == 0 && (S_ISFIFO(status.st_mode) || S_ISCHR(status.st_mode)));
}

qcow::Result<void> stream_out(qcow::Disk& disk, qcow::GuestOffset at, std::uint64_t length, std::FILE* to,
                              const std::string& name, const std::function<void(std::uint64_t done)>& progress) {
    constexpr std::uint64_t piece = std::uint64_t{1} << 20;
    std::vector<std::byte> buffer(std::min(piece, length));
    for (std::uint64_t done = 0; done < length;) {
        const auto part = std::span(buffer).first(std::min<std::uint64_t>(buffer.size(), length - done));
        if (auto read = disk.read(at + done, part); !read) return read;
        if (std::fwrite(part.data(), 1, part.size(), to) != part.size()) return cannot("cannot write", name);
        done += part.size();
        if (progress) progress(done);
    }
    if (std::fflush(to) != 0) return cannot("cannot write", name);
    return {};
}

qcow::Result<void> stream_to(qcow::Disk& disk, const std::string& path,
                             const std::function<void(std::uint64_t done)>& progress) {
    const bool standard = is_standard_output(path);
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> opened(standard ? nullptr : std::fopen(path.c_str(), "w"),
                                                                 &std::fclose);
    if (!standard && !opened) return cannot("cannot open", path);
    auto* to = standard ? stdout : opened.get();
    if (isatty(fileno(to)) != 0) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, path,
                                           "is a terminal, which is no place for a disk; give a file, or lead the "
                                           "output into one"});
    }
    return stream_out(disk, {}, disk.size(), to, standard ? "standard output" : path, progress);
}

}  // namespace tool
