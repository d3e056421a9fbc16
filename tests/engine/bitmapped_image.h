#pragma once
// Images with persistent bitmaps that QEMU made, and what their bits must be.

#include <algorithm>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "engine/image_kinds.h"

namespace qcow::test {

struct BitmapSpec {
    std::string name;
    std::uint64_t granularity = 0;
    bool enabled = true;
};

/// A bitmap as an array of bits.
struct BitmapModel {
    BitmapSpec spec;
    std::vector<bool> bits;

    BitmapModel(BitmapSpec given, std::uint64_t size)
        : spec(std::move(given)), bits((size + spec.granularity - 1) / spec.granularity) {}

    void set(std::uint64_t at, std::uint64_t length);

    /// The first bit that differs.
    [[nodiscard]] std::optional<std::string> difference(const std::vector<bool>& found) const;
};

/// The files on disk while QEMU works on them.
template <class Work>
void with_files(Files& files, const Work& work) {
    const TemporaryDirectory directory;
    save(files, directory.path());
    work(directory.path());
    for (auto& [name, storage] : files) storage = load(directory / name, name);
}

void add_bitmap(const BitmapSpec& spec, const std::filesystem::path& directory);

/// The bits as QEMU finds them.
std::vector<bool> bits_in_qemu(const BitmapSpec& spec, std::uint64_t size, const std::filesystem::path& directory);

/// The flags of the bitmaps as QEMU finds them: "name: auto in-use".
std::set<std::string> flags_in_qemu(const std::filesystem::path& directory);

/// The bits of a range as we find them, which the runs must cover exactly, by turns.
std::vector<bool> bits_of(Image& image, const BitmapSpec& spec, std::uint64_t begin, std::uint64_t length);

inline std::vector<bool> bits_of(Image& image, const BitmapSpec& spec) { return bits_of(image, spec, 0, image.size()); }

/// What `info` says of one bitmap.
BitmapInfo bitmap_info(Image& image, const std::string& name);

}  // namespace qcow::test
