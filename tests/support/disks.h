#pragma once
// Opening images and holding disks against files.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "qcow/copy.h"
#include "qcow/image.h"
#include "support/random.h"

namespace qcow::test {

/// The value, or an exception with the error's message. An object: a function would compete with qcow::value_of, which
/// the argument's namespace makes visible.
inline constexpr auto value_of = []<class T>(Result<T> result) -> T {
    if (!result) throw std::runtime_error(result.error().message());
    if constexpr (!std::is_void_v<T>) return *std::move(result);
};

/// Opens an image with all that it names.
Result<std::shared_ptr<Image>> try_open(const std::string& path, std::optional<Format> format = {});

std::shared_ptr<Image> must_open(const std::string& path, std::optional<Format> format = {});

/// Opens an image without what it names.
std::shared_ptr<Image> open_alone(const std::string& path);

std::string file_bytes(const std::string& path);

void put_file(const std::string& path, const std::string& bytes);

/// A file that is compared with: reads anywhere, and knows its holes.
class ReferenceFile {
public:
    /// With a limit, it is taken to end there.
    explicit ReferenceFile(const std::string& path, std::uint64_t limit = ~std::uint64_t{0});
    ReferenceFile(const ReferenceFile&) = delete;
    ReferenceFile& operator=(const ReferenceFile&) = delete;
    ~ReferenceFile() { close(fd_); }

    [[nodiscard]] std::uint64_t size() const { return size_; }

    void read(std::uint64_t at, std::span<std::byte> to) const;

    /// The first byte at or after `at` that is not in a hole; size() if there is none.
    [[nodiscard]] std::uint64_t next_data(std::uint64_t at) const;

private:
    int fd_;
    std::uint64_t size_ = 0;
};

/// The first byte in which two files differ, nothing if they are the same. What is a hole in both is not read.
std::optional<std::uint64_t> first_difference(const ReferenceFile& a, const ReferenceFile& b);

/// Copies the disk into a new file at `target`.
void copy_to_file(Disk& disk, const std::string& target, const CopyOptions& options = {});

/// Reads of any size at any place of a disk, held against the reference.
void expect_random_reads(Disk& disk, const ReferenceFile& reference, Random& random, unsigned count);

}  // namespace qcow::test
