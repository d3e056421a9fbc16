#include "storage/system_calls.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>

namespace qcow::test {
namespace {

bool recording = false;
bool unnamed_files = true;
std::vector<SystemCall> calls;

int record_sync(int result, int fd) {
    struct stat status = {};
    if (recording && result == 0 && fstat(fd, &status) == 0) calls.push_back({SystemCall::Kind::sync, status.st_ino});
    return result;
}

int record_name(int result, const char* path) {
    struct stat status = {};
    if (recording && result == 0 && stat(path, &status) == 0)
        calls.push_back({SystemCall::Kind::name, status.st_ino, path});
    return result;
}

}  // namespace

SystemCalls::SystemCalls() {
    calls.clear();
    recording = true;
}
SystemCalls::~SystemCalls() { recording = false; }
const std::vector<SystemCall>& SystemCalls::seen() const { return calls; }

NoUnnamedFiles::NoUnnamedFiles() { unnamed_files = false; }
NoUnnamedFiles::~NoUnnamedFiles() { unnamed_files = true; }

}  // namespace qcow::test

extern "C" {

int fsync(int fd) { return qcow::test::record_sync(static_cast<int>(syscall(SYS_fsync, fd)), fd); }

int fdatasync(int fd) { return qcow::test::record_sync(static_cast<int>(syscall(SYS_fdatasync, fd)), fd); }

int linkat(int from_directory, const char* from, int to_directory, const char* to, int flags) noexcept {
    return qcow::test::record_name(static_cast<int>(syscall(SYS_linkat, from_directory, from, to_directory, to, flags)),
                                   to);
}

int rename(const char* from, const char* to) noexcept {
    return qcow::test::record_name(static_cast<int>(syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0)), to);
}

int open(const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const auto mode = va_arg(arguments, unsigned);
    va_end(arguments);
    if (!qcow::test::unnamed_files && (flags & O_TMPFILE) == O_TMPFILE) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return static_cast<int>(syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}

}  // extern "C"
