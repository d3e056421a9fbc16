// The jobs that make, resize and check images.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/bits.h"
#include "qcow/create.h"
#include "qcow/resize.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow {
namespace {

using namespace qcow::test;
using testing::ElementsAre;

class JobsTest : public testing::Test {
protected:
    [[nodiscard]] std::string path(const std::string& name) const { return directory_ / name; }
    [[nodiscard]] ImageSpec image(const std::string& name) const { return {.location = {.path = path(name)}}; }

    [[nodiscard]] CreateJob overlay(const std::string& name, const std::string& backing) const {
        return {.image = {.path = path(name), .options = {.backing_name = backing, .backing_format = "qcow2"}},
                .size_of_backing = true};
    }

    TemporaryDirectory directory_;
};

TEST_F(JobsTest, CreateMakesAnImage) {
    const auto made = must(create({.image = {.path = path("disk"), .options = {.size = 1000}}}));
    EXPECT_EQ(made.path, path("disk"));
    EXPECT_EQ(made.size, 1024U);
    EXPECT_EQ(must(open_image(image("disk")))->size(), 1024U);
    must(create({.image = {.path = path("raw"), .format = Format::raw, .options = {.size = 1000}}}));
    EXPECT_EQ(read_file(path("raw")), std::string(1024, '\0'));
}

TEST_F(JobsTest, CreateLooksAtTheBackingFile) {
    must(create({.image = {.path = path("base"), .options = {.size = MiB}}}));
    EXPECT_EQ(must(create(overlay("overlay", "base"))).size, MiB);
    EXPECT_TRUE(fails(create(overlay("overlay", "absent")), Errc::not_found, {"backing file", "absent"}));
    auto unchecked = overlay("unchecked", "absent");
    unchecked.unchecked = true;
    EXPECT_TRUE(fails(create(unchecked), Errc::invalid_argument, {"how large"}));
    unchecked.size_of_backing = false;
    unchecked.image.options.size = MiB;
    EXPECT_EQ(must(create(unchecked)).size, MiB);
}

TEST_F(JobsTest, CreateTakesNamesAsPeopleWriteThem) {
    must(create({.image = {.path = path("vm:base"), .options = {.size = MiB}}}));
    const auto described = R"(json:{"driver":"qcow2","file.filename":")" + path("vm:base") + "\"}";
    for (const auto& [name, recorded] :
         {std::pair<std::string, std::string>{"vm:base", "./vm:base"}, {described, described}}) {
        auto job = overlay("overlay", name);
        job.image.options.backing_format = name == described ? "" : "qcow2";
        job.image.options.data_file_name = "vm:data";
        must(create(job));
        const auto info = must(must(open_image(image("overlay")))->info());
        EXPECT_EQ(info.backing->name, recorded);
        EXPECT_EQ(info.backing->format, "qcow2");
        EXPECT_EQ(info.data_file->name, "./vm:data");
        std::filesystem::remove(path("vm:data"));
    }
}

TEST_F(JobsTest, CreateOverwritesNoLayerBelow) {
    must(create({.image = {.path = path("base"), .options = {.size = MiB}}}));
    must(create(overlay("middle", "base")));
    for (const auto* target : {"base", "middle"}) {
        for (const bool unchecked : {false, true}) {
            auto job = overlay(target, "middle");
            job.unchecked = unchecked;
            job.size_of_backing = !unchecked;
            EXPECT_TRUE(fails(create(job), Errc::invalid_argument, {"would overwrite", "backing file"}));
        }
    }
    EXPECT_THAT(directory_.names(), ElementsAre("base", "middle"));
}

TEST_F(JobsTest, CreateRefusesARawOverlay) {
    auto job = overlay("raw", "base");
    job.image.format = Format::raw;
    EXPECT_TRUE(fails(create(job), Errc::invalid_argument, {"raw images have no backing file"}));
}

TEST_F(JobsTest, ResizeChangesTheSize) {
    using enum ResizeJob::Change;
    must(create({.image = {.path = path("disk"), .options = {.size = MiB}}}));
    const auto resized = [&](ResizeJob::Change change, std::uint64_t bytes, Image::Shrink shrink) {
        return resize({.image = image("disk"), .change = change, .bytes = bytes, .shrink = shrink});
    };
    using enum Image::Shrink;
    const auto grown = must(resized(grow, MiB, refuse));
    EXPECT_EQ(grown.old_size, MiB);
    EXPECT_EQ(grown.new_size, 2 * MiB);
    EXPECT_EQ(must(resized(to, 3 * MiB, refuse)).new_size, 3 * MiB);
    EXPECT_TRUE(fails(resized(shrink, MiB, refuse), Errc::invalid_argument, {"would be lost"}));
    EXPECT_TRUE(fails(resized(shrink, 4 * MiB, allow), Errc::invalid_argument, {"fewer cannot be"}));
    EXPECT_TRUE(fails(resized(grow, ~std::uint64_t{0}, refuse), Errc::invalid_argument, {"no disk can be that large"}));
    EXPECT_EQ(must(resized(shrink, MiB, allow)).new_size, 2 * MiB);
    EXPECT_EQ(must(open_image(image("disk")))->size(), 2 * MiB);
}

TEST_F(JobsTest, ResizeTellsThatItRounds) {
    must(create({.image = {.path = path("disk"), .options = {.size = MiB}}}));
    std::vector<Warning::Kind> told;
    const JobControl control{.warn = [&](const Warning& warning) { told.push_back(warning.kind); }};
    const auto resized = must(resize({.image = image("disk"), .change = ResizeJob::Change::grow, .bytes = 1}, control));
    EXPECT_EQ(resized.new_size, MiB + 512);
    EXPECT_THAT(told, ElementsAre(Warning::Kind::rounded_size));
}

TEST_F(JobsTest, CheckFindsABrokenChain) {
    must(create({.image = {.path = path("base"), .options = {.size = MiB}}}));
    must(create(overlay("overlay", "base")));
    const auto sound = must(check(image("overlay")));
    EXPECT_EQ(sound.format, Format::qcow2);
    EXPECT_TRUE(sound.report.clean());
    std::filesystem::remove(path("base"));
    const auto broken = must(check(image("overlay")));
    EXPECT_EQ(broken.report.errors, 1U);
    ASSERT_EQ(broken.report.findings.size(), 1U);
    EXPECT_EQ(broken.report.findings[0].place, "backing chain");
    EXPECT_TRUE(fails(check(image("absent")), Errc::not_found));
}

TEST_F(JobsTest, CheckIsCancelled) {
    must(create(
        {.image = {.path = path("disk"),
                   .options = {.size = 16 * MiB, .cluster_size = 512, .preallocation = Preallocation::metadata}}}));
    std::stop_source stop;
    CheckOptions options{.workers = 2};
    options.control.stop = stop.get_token();
    unsigned calls = 0;
    options.control.progress = [&](std::uint64_t done, std::uint64_t total) {
        EXPECT_LT(done, total);
        EXPECT_EQ(total, 16 * MiB / 512 * 8);
        stop.request_stop();
        ++calls;
    };
    EXPECT_TRUE(fails(check(image("disk"), options), Errc::cancelled));
    EXPECT_LE(calls, 2U);
}

}  // namespace
}  // namespace qcow
