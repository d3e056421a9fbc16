#pragma once
// The system calls with which new files get their names and become durable: written down, or failing. The program of
// these tests has them in place of the C library's.

#include <sys/types.h>

#include <string>
#include <vector>

namespace qcow::test {

struct SystemCall {
    enum class Kind {
        sync,  ///< fsync or fdatasync of `inode`, a file or a directory
        name,  ///< `path` was given to `inode`
    };
    Kind kind;
    ino_t inode;
    std::string path = {};
};

/// Writes down those that succeed, as long as it lives. One at a time.
class SystemCalls {
public:
    SystemCalls();
    SystemCalls(const SystemCalls&) = delete;
    SystemCalls& operator=(const SystemCalls&) = delete;
    ~SystemCalls();
    [[nodiscard]] const std::vector<SystemCall>& seen() const;
};

/// As long as it lives, no file system has unnamed files.
class NoUnnamedFiles {
public:
    NoUnnamedFiles();
    NoUnnamedFiles(const NoUnnamedFiles&) = delete;
    NoUnnamedFiles& operator=(const NoUnnamedFiles&) = delete;
    ~NoUnnamedFiles();
};

}  // namespace qcow::test
