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

    void set(std::uint64_t at, std::uint64_t length) {
        if (length == 0) return;
        std::fill(bits.begin() + static_cast<std::ptrdiff_t>(at / spec.granularity),
                  bits.begin() + static_cast<std::ptrdiff_t>((at + length - 1) / spec.granularity + 1), true);
    }

    /// The first bit that differs.
    [[nodiscard]] std::optional<std::string> difference(const std::vector<bool>& found) const {
        for (std::size_t i = 0; i < bits.size(); ++i) {
            if (found.at(i) != bits[i])
                return fmt::format("bit {} of {} of bitmap \"{}\" is {}", i, bits.size(), spec.name, !bits[i]);
        }
        return std::nullopt;
    }
};

/// The files on disk while QEMU works on them.
template <class Work>
void with_files(Files& files, const Work& work) {
    const TemporaryDirectory directory;
    save(files, directory.path());
    work(directory.path());
    for (auto& [name, storage] : files) storage = load(directory / name, name);
}

inline void add_bitmap(const BitmapSpec& spec, const std::filesystem::path& directory) {
    must_qemu_img({"bitmap", "--add", "-g", std::to_string(spec.granularity), spec.enabled ? "--enable" : "--disable",
                   image_name, spec.name},
                  directory);
}

/// The bits as QEMU finds them.
inline std::vector<bool> bits_in_qemu(const BitmapSpec& spec, std::uint64_t size,
                                      const std::filesystem::path& directory) {
    const auto found = must_run({"nbdinfo", "--json", "--map=qemu:dirty-bitmap:" + spec.name, "--", "[", "qemu-nbd",
                                 "-r", "-f", "qcow2", "-B", spec.name, image_name, "]"},
                                directory);
    BitmapModel model(spec, size);
    for (const auto& extent : nlohmann::json::parse(found.out)) {
        if (extent.at("type").get<unsigned>() == 0) continue;
        const auto at = extent.at("offset").get<std::uint64_t>();
        model.set(at, std::min(extent.at("length").get<std::uint64_t>(), size - at));
    }
    return model.bits;
}

/// The flags of the bitmaps as QEMU finds them: "name: auto in-use".
inline std::set<std::string> flags_in_qemu(const std::filesystem::path& directory) {
    std::set<std::string> result;
    const auto info = qemu_img_json({"info", "-U", "--output=json", "-f", "qcow2", image_name}, directory);
    const auto& data = info.at("format-specific").at("data");
    for (const auto& bitmap : data.value("bitmaps", nlohmann::json::array())) {
        auto flags = bitmap.at("flags").get<std::set<std::string>>();
        result.insert(fmt::format("{}: {}", bitmap.at("name").get<std::string>(), fmt::join(flags, " ")));
    }
    return result;
}

/// The bits of a range as we find them, which the runs must cover exactly, by turns.
inline std::vector<bool> bits_of(Image& image, const BitmapSpec& spec, std::uint64_t begin, std::uint64_t length) {
    BitmapModel model(spec, image.size());
    std::uint64_t at = begin;
    std::optional<bool> last;
    value_of(image.each_dirty(spec.name, {begin}, length, [&](const DirtyRun& run) -> Result<void> {
        if (run.start.value != at || run.length == 0 || run.dirty == last)
            throw std::runtime_error(fmt::format("run at {}, expected at {}", run.start.value, at));
        at += run.length;
        last = run.dirty;
        if (run.dirty) model.set(run.start.value, run.length);
        return {};
    }));
    if (at != begin + length) throw std::runtime_error(fmt::format("the runs end at {}", at));
    return model.bits;
}

inline std::vector<bool> bits_of(Image& image, const BitmapSpec& spec) { return bits_of(image, spec, 0, image.size()); }

/// What `info` says of one bitmap.
inline BitmapInfo bitmap_info(Image& image, const std::string& name) {
    for (auto& bitmap : value_of(image.info()).bitmaps) {
        if (bitmap.name == name) return bitmap;
    }
    throw std::runtime_error("no bitmap " + name);
}

}  // namespace qcow::test
