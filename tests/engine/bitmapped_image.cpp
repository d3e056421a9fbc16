#include "engine/bitmapped_image.h"

namespace qcow::test {

void BitmapModel::set(std::uint64_t at, std::uint64_t length) {
    if (length == 0) return;
    std::fill(bits.begin() + static_cast<std::ptrdiff_t>(at / spec.granularity),
              bits.begin() + static_cast<std::ptrdiff_t>((at + length - 1) / spec.granularity + 1), true);
}

std::optional<std::string> BitmapModel::difference(const std::vector<bool>& found) const {
    for (std::size_t i = 0; i < bits.size(); ++i) {
        if (found.at(i) != bits[i])
            return fmt::format("bit {} of {} of bitmap \"{}\" is {}", i, bits.size(), spec.name, !bits[i]);
    }
    return std::nullopt;
}

void add_bitmap(const BitmapSpec& spec, const std::filesystem::path& directory) {
    must_qemu_img({"bitmap", "--add", "-g", std::to_string(spec.granularity), spec.enabled ? "--enable" : "--disable",
                   image_name, spec.name},
                  directory);
}

std::vector<bool> bits_in_qemu(const BitmapSpec& spec, std::uint64_t size, const std::filesystem::path& directory) {
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

std::set<std::string> flags_in_qemu(const std::filesystem::path& directory) {
    std::set<std::string> result;
    const auto info = qemu_img_json({"info", "-U", "--output=json", "-f", "qcow2", image_name}, directory);
    const auto& data = info.at("format-specific").at("data");
    for (const auto& bitmap : data.value("bitmaps", nlohmann::json::array())) {
        auto flags = bitmap.at("flags").get<std::set<std::string>>();
        result.insert(fmt::format("{}: {}", bitmap.at("name").get<std::string>(), fmt::join(flags, " ")));
    }
    return result;
}

std::vector<bool> bits_of(Image& image, const BitmapSpec& spec, std::uint64_t begin, std::uint64_t length) {
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

BitmapInfo bitmap_info(Image& image, const std::string& name) {
    for (auto& bitmap : value_of(image.info()).bitmaps) {
        if (bitmap.name == name) return bitmap;
    }
    throw std::runtime_error("no bitmap " + name);
}

}  // namespace qcow::test
