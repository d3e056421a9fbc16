#pragma once
// Files that mean harm: each is refused, or handled within small bounds of time and memory, with an error that says on
// one line what is wrong and where. The bounds, and what the tests of them share.

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hostile_image.h"
#include "qcow/image.h"
#include "support/effort.h"

namespace qcow::hostile {

inline constexpr double slowness = test::sanitized ? 8 : 1;
inline constexpr std::size_t fatness = test::sanitized ? 8 : 1;
inline constexpr double max_seconds = 2 * slowness;
inline constexpr std::size_t max_open_bytes = 64 * MiB * fatness;

/// A line of /proc/self/status, in bytes.
std::size_t memory_status(const std::string& name);

/// What `work` takes: seconds of a processor, so that a busy machine does not matter, and memory at its worst beyond
/// what there was before.
struct Cost {
    double seconds = 0;
    std::size_t bytes = 0;
};
Cost cost_of(const std::function<void()>& work);

void expect_good_message(const Error& error);

template <class T>
void expect_error(const Result<T>& result, Errc code, const std::vector<std::string>& fragments = {}) {
    ASSERT_FALSE(result.has_value());
    expect_good_message(result.error());
    EXPECT_EQ(static_cast<int>(result.error().code), static_cast<int>(code)) << result.error().message();
    for (const auto& fragment : fragments) EXPECT_THAT(result.error().message(), testing::HasSubstr(fragment));
}

OpenOptions options_for(std::optional<Format> format, Gate gate = no_files());

/// Opens within the bounds that hold for every image.
Result<std::shared_ptr<Image>> open_bounded(std::shared_ptr<Storage> storage, Gate gate = no_files());

/// For writing. Hostile images have refcounts that are too low, too: they are verified where that is what is tested.
OpenOptions options_for_writing(bool verify_refcounts = false);

/// Opens for writing within the same bounds, and what the verification of refcounts may take.
Result<std::shared_ptr<Image>> open_for_writing_bounded(std::shared_ptr<Storage> storage,
                                                        bool verify_refcounts = false);

Result<std::shared_ptr<Image>> open_bounded(fuzz::SparseFile file);

/// A check within the bounds; `budget` is what it may use, which the memory it really takes must not exceed by much.
Result<CheckReport> check_bounded(Image& image, std::size_t budget = 512 * MiB);

Result<ImageInfo> info_bounded(const Image& image);

/// The same, or why a part of it could not be read.
Result<ImageInfo> whole_info_bounded(const Image& image);

class Hostile : public testing::Test {
protected:
    Hostile();
    ~Hostile() override { std::filesystem::remove_all(dir_); }

    [[nodiscard]] std::string path(const std::string& name) const { return dir_ / name; }

    /// The file as a real one, with holes.
    std::string write(const std::string& name, const fuzz::SparseFile& file) const;

    std::shared_ptr<Storage> open(const std::string& name) const;

    /// An image that holds nothing but the name of another one.
    static fuzz::SparseFile overlay(const std::string& backing, std::string_view format = "qcow2");

    std::filesystem::path dir_;
};

}  // namespace qcow::hostile
