#pragma once
// A directory of its own for a test, gone when the test is.

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>

namespace qcow::test {

class TempDir {
public:
    TempDir() {
        auto pattern = (parent() / "qcow-test-XXXXXX").string();
        if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("cannot make a directory like " + pattern);
        path_ = pattern;
    }
    TempDir(const TempDir&) = delete;
    TempDir& operator=(const TempDir&) = delete;
    ~TempDir() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }

    [[nodiscard]] const std::filesystem::path& path() const { return path_; }
    [[nodiscard]] std::string file(const std::string& name) const { return (path_ / name).string(); }

private:
    /// In memory, where there is a place: the peers flush each image that they make to the disk.
    static std::filesystem::path parent() {
        const std::filesystem::path memory = "/dev/shm";
        if (std::getenv("TMPDIR") == nullptr && access(memory.c_str(), W_OK) == 0) return memory;
        return std::filesystem::temp_directory_path();
    }

    std::filesystem::path path_;
};

}  // namespace qcow::test
