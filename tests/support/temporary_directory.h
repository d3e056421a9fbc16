#pragma once
// A directory for the files of one test.

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace qcow::test {

/// Empty at first; removed with everything in it when the test is done.
class TemporaryDirectory {
public:
    TemporaryDirectory() : TemporaryDirectory(usual_parent()) {}

    explicit TemporaryDirectory(const std::filesystem::path& parent) {
        std::string pattern = (parent / "qcow-test-XXXXXX").string();
        if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("cannot make a temporary directory");
        path_ = pattern;
    }
    TemporaryDirectory(const TemporaryDirectory&) = delete;
    TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
    ~TemporaryDirectory() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }

    /// The path of the file `name` in it, whether or not there is one.
    [[nodiscard]] std::string operator/(std::string_view name) const { return (path_ / name).string(); }

    [[nodiscard]] std::string file(std::string_view name) const { return *this / name; }
    [[nodiscard]] const std::filesystem::path& path() const { return path_; }

    [[nodiscard]] std::set<std::string> names() const {
        std::set<std::string> result;
        for (const auto& entry : std::filesystem::directory_iterator(path_)) result.insert(entry.path().filename());
        return result;
    }

private:
    /// In memory, where there is a place: the peers flush each image that they make to the disk.
    static std::filesystem::path usual_parent() {
        const std::filesystem::path memory = "/dev/shm";
        if (std::getenv("TMPDIR") == nullptr && access(memory.c_str(), W_OK) == 0) return memory;
        return std::filesystem::temp_directory_path();
    }

    std::filesystem::path path_;
};

/// Where direct I/O works in general: not in memory.
inline constexpr const char* on_a_disk = "/var/tmp";

inline void write_file(const std::string& path, std::string_view contents) {
    std::ofstream(path, std::ios::binary) << contents;
}

inline std::string read_file(const std::string& path) {
    std::ostringstream contents;
    contents << std::ifstream(path, std::ios::binary).rdbuf();
    return contents.str();
}

}  // namespace qcow::test
