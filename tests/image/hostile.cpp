#include "image/hostile.h"

namespace qcow::hostile {

std::size_t memory_status(const std::string& name) {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.starts_with(name + ":")) return std::stoull(line.substr(name.size() + 1)) * KiB;
    }
    return 0;
}

Cost cost_of(const std::function<void()>& work) {
    std::ofstream("/proc/self/clear_refs") << "5";  // forgets the peak so far
    const auto before = memory_status("VmRSS");
    const std::clock_t begin = std::clock();
    work();
    Cost cost;
    cost.seconds = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    const auto peak = memory_status("VmHWM");
    cost.bytes = peak > before ? peak - before : 0;
    return cost;
}

void expect_good_message(const Error& error) {
    const auto message = error.message();
    EXPECT_FALSE(error.what.empty());
    EXPECT_LT(message.size(), 10'000U);
    for (const char c : message) ASSERT_TRUE(static_cast<unsigned char>(c) >= 0x20 && c != 0x7f) << message;
}

OpenOptions options_for(std::optional<Format> format, Gate gate) {
    OpenOptions options;
    options.format = format;
    options.gate = std::move(gate);
    return options;
}

Result<std::shared_ptr<Image>> open_bounded(std::shared_ptr<Storage> storage, Gate gate) {
    Result<std::shared_ptr<Image>> result;
    const auto cost = cost_of([&] { result = open_image(std::move(storage), options_for(Format::qcow2, gate)); });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, max_open_bytes);
    if (!result) expect_good_message(result.error());
    return result;
}

OpenOptions options_for_writing(bool verify_refcounts) {
    auto options = options_for(Format::qcow2);
    options.writable = true;
    options.write.verify_refcounts = verify_refcounts;
    return options;
}

Result<std::shared_ptr<Image>> open_for_writing_bounded(std::shared_ptr<Storage> storage, bool verify_refcounts) {
    Result<std::shared_ptr<Image>> result;
    const auto cost = cost_of([&] { result = open_image(std::move(storage), options_for_writing(verify_refcounts)); });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, verify_refcounts ? max_open_bytes + 256 * MiB * fatness : max_open_bytes);
    if (!result) expect_good_message(result.error());
    return result;
}

Result<std::shared_ptr<Image>> open_bounded(fuzz::SparseFile file) {
    return open_bounded(fuzz::storage_of(std::move(file), "hostile.qcow2"));
}

Result<CheckReport> check_bounded(Image& image, std::size_t budget) {
    Result<CheckReport> result;
    CheckOptions options;
    options.workers = 2;
    options.max_findings = 100;
    options.memory_bytes = budget;
    const auto cost = cost_of([&] { result = image.check(options); });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, (budget + 64 * MiB) * fatness);
    if (!result) expect_good_message(result.error());
    return result;
}

Result<ImageInfo> info_bounded(const Image& image) {
    Result<ImageInfo> result;
    const auto cost = cost_of([&] { result = image.info(); });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, 128 * MiB * fatness);
    if (!result) expect_good_message(result.error());
    return result;
}

Result<ImageInfo> whole_info_bounded(const Image& image) {
    auto info = info_bounded(image);
    if (!info) return info;
    for (const auto* error : {&info->encryption_error, &info->snapshots_error, &info->bitmaps_error}) {
        if (*error) expect_good_message(**error);
        if (*error) return std::unexpected(**error);
    }
    return info;
}

Hostile::Hostile() {
    std::string name = std::filesystem::temp_directory_path() / "hostile-XXXXXX";
    dir_ = ::mkdtemp(name.data());
}

std::string Hostile::write(const std::string& name, const fuzz::SparseFile& file) const {
    const auto target = path(name);
    const int fd = ::open(target.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    EXPECT_GE(fd, 0);
    for (const auto& segment : file.segments) {
        EXPECT_EQ(::pwrite(fd, segment.bytes.data(), segment.bytes.size(), static_cast<off_t>(segment.offset)),
                  static_cast<ssize_t>(segment.bytes.size()));
    }
    EXPECT_EQ(::ftruncate(fd, static_cast<off_t>(file.size())), 0);
    ::close(fd);
    return target;
}

std::shared_ptr<Storage> Hostile::open(const std::string& name) const {
    auto opened = open_file(path(name));
    EXPECT_TRUE(opened.has_value()) << opened.error().message();
    return opened ? *opened : nullptr;
}

fuzz::SparseFile Hostile::overlay(const std::string& backing, std::string_view format) {
    HostileImage image(9);
    image.size = 4096;
    image.backing_name = backing;
    if (!format.empty()) image.set_backing_format(format);
    return image.finish();
}

}  // namespace qcow::hostile
