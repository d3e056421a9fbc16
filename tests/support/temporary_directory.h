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

    explicit TemporaryDirectory(const std::filesystem::path& parent);
    TemporaryDirectory(const TemporaryDirectory&) = delete;
    TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
    ~TemporaryDirectory();

    /// The path of the file `name` in it, whether or not there is one.
    [[nodiscard]] std::string operator/(std::string_view name) const { return (path_ / name).string(); }

    [[nodiscard]] std::string file(std::string_view name) const { return *this / name; }
    [[nodiscard]] const std::filesystem::path& path() const { return path_; }

    [[nodiscard]] std::set<std::string> names() const;

private:
    /// In memory, where there is a place: the peers flush each image that they make to the disk.
    static std::filesystem::path usual_parent();

    std::filesystem::path path_;
};

/// Where direct I/O works in general: not in memory.
inline constexpr const char* on_a_disk = "/var/tmp";

void write_file(const std::string& path, std::string_view contents);

std::string read_file(const std::string& path);

}  // namespace qcow::test
