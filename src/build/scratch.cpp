#include "build/scratch.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <string>

namespace qcow {
namespace {

constexpr const char* name = "temporary file";

std::string directory() {
    const char* given = std::getenv("TMPDIR");
    return given == nullptr || *given == '\0' ? "/var/tmp" : given;
}

}  // namespace

Result<void> ScratchFile::open() {
    if (fd_.get() >= 0) return {};
    const auto where = directory();
    int fd = ::open(where.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR)) {
        auto path = where + "/qcow-build-XXXXXX";
        fd = mkostemp(path.data(), O_CLOEXEC);
        if (fd >= 0) unlink(path.c_str());
    }
    if (fd < 0) return system_error("cannot make a temporary file", where, errno);
    fd_.reset(fd);
    return {};
}

Result<void> ScratchFile::write(std::uint64_t at, std::span<const std::byte> from) {
    TRY_VOID(open());
    end_ = std::max(end_, at + from.size());
    while (!from.empty()) {
        const auto written = pwrite(fd_.get(), from.data(), from.size(), static_cast<off_t>(at));
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return system_error("cannot write", name, written == 0 ? EIO : errno);
        at += static_cast<std::uint64_t>(written);
        from = from.subspan(static_cast<std::size_t>(written));
    }
    return {};
}

Result<std::uint64_t> ScratchFile::append(std::span<const std::byte> from) {
    const auto at = end_;
    TRY_VOID(write(at, from));
    return at;
}

Result<void> ScratchFile::read(std::uint64_t at, std::span<std::byte> to) const {
    while (!to.empty()) {
        const auto got = fd_.get() < 0 ? 0 : pread(fd_.get(), to.data(), to.size(), static_cast<off_t>(at));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return system_error("cannot read", name, errno);
        if (got == 0) {
            std::ranges::fill(to, std::byte{0});
            return {};
        }
        at += static_cast<std::uint64_t>(got);
        to = to.subspan(static_cast<std::size_t>(got));
    }
    return {};
}

}  // namespace qcow
