#include "operation/stream.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <vector>

#include "base/bits.h"
#include "base/going_on.h"
#include "base/within_memory.h"
#include "storage/file.h"

namespace qcow {
namespace {

bool is_standard_output(const std::string& path) {
    constexpr std::array names = {"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"};
    return std::ranges::find(names, path) != names.end();
}

Result<void> write_all(int descriptor, std::span<const std::byte> bytes, const std::string& name) {
    while (!bytes.empty()) {
        const auto written = write(descriptor, bytes.data(), bytes.size());
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) return system_error("cannot write", name, errno);
        bytes = bytes.subspan(static_cast<std::size_t>(written));
    }
    return {};
}

}  // namespace

bool is_stream(const std::string& path) {
    struct stat status = {};
    return is_standard_output(path) ||
           (stat(path.c_str(), &status) == 0 && (S_ISFIFO(status.st_mode) || S_ISCHR(status.st_mode)));
}

Result<void> copy_to_stream(Disk& disk, const GuestRange& range, int descriptor, const std::string& name,
                            const JobControl& control) {
    return within_memory([&]() -> Result<void> {
        std::vector<std::byte> buffer(std::min(MiB, range.length));
        for (std::uint64_t done = 0; done < range.length;) {
            TRY_VOID(verify_goes_on(control));
            const auto part = std::span(buffer).first(std::min<std::uint64_t>(buffer.size(), range.length - done));
            TRY_VOID(disk.read(range.start + done, part));
            TRY_VOID(write_all(descriptor, part, name));
            done += part.size();
            if (control.progress) control.progress(done, range.length);
        }
        return {};
    });
}

Result<void> stream_to(Disk& disk, const std::string& path, FilesInUse& in_use, const JobControl& control) {
    const bool standard = is_standard_output(path);
    const std::string name = standard ? "standard output" : path;
    if (standard) TRY_VOID(in_use.add(FilesInUse::Use::written, "/dev/stdout", name));
    const FileDescriptor opened(standard ? -1 : open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOCTTY));
    if (!standard && opened.get() < 0) return system_error("cannot open", path, errno);
    const int descriptor = standard ? STDOUT_FILENO : opened.get();
    if (isatty(descriptor) != 0) {
        return fail(Errc::invalid_argument, path,
                    "is a terminal, which is no place for a disk; give a file, or lead the output into one");
    }
    return copy_to_stream(disk, {{0}, disk.size()}, descriptor, name, control);
}

}  // namespace qcow
