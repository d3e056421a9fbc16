// What measure() says of a new image, beside the file that create() and convert() then make.

#include "qcow/measure.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "base/bits.h"
#include "support/qemu.h"
#include "support/random.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow {
namespace {

using namespace qcow::test;
using testing::Optional;

/// Options of a new image, for the library and for QEMU.
struct Target {
    CreateOptions options;
    std::string text;
};

std::vector<Target> targets() {
    std::vector<Target> all;
    const auto add = [&](const CreateOptions& options, const std::string& text) { all.push_back({options, text}); };
    add({}, "compat=1.1");
    add({.version = 2}, "compat=0.10");
    add({.cluster_size = 512}, "cluster_size=512");
    add({.version = 2, .cluster_size = 4096}, "compat=0.10,cluster_size=4k");
    add({.cluster_size = 2 * MiB}, "cluster_size=2M");
    add({.cluster_size = 16 * KiB, .extended_l2 = true}, "cluster_size=16k,extended_l2=on");
    for (const unsigned bits : {1U, 2U, 4U, 8U, 32U, 64U}) {
        add({.cluster_size = 1024, .refcount_bits = bits}, "cluster_size=1k,refcount_bits=" + std::to_string(bits));
    }
    add({.preallocation = Preallocation::metadata}, "preallocation=metadata");
    add({.cluster_size = 4096, .preallocation = Preallocation::full}, "cluster_size=4k,preallocation=full");
    return all;
}

class MeasureTest : public testing::Test {
protected:
    [[nodiscard]] std::string path(const std::string& name) const { return directory_ / name; }
    [[nodiscard]] ConvertJob::Source source(const std::string& name, const std::string& snapshot = {}) const {
        return {.image = {.location = {.path = path(name)}}, .snapshot = snapshot};
    }
    void qemu(const Arguments& arguments) const { must_qemu_img(arguments, directory_.path()); }

    /// Makes images whose clusters with data have no zeros. Returns their names.
    [[nodiscard]] std::vector<std::string> make_sources() const {
        auto random = Random::named("measure");
        const auto write = [&](const std::string& name, std::uint64_t size, unsigned unit) {
            std::vector<std::string> commands;
            for (int i = 0; i < 12; ++i) {
                const auto at = random.below(size / unit);
                const auto length = random.between(1, std::min<std::uint64_t>(size / unit - at, 1 + MiB / 8 / unit));
                const auto kind = i % 4 == 3 && !name.ends_with(".raw") ? "-z"
                                  : i % 4 == 2 && unit >= 65536         ? "-c -P 7"
                                                                        : "-P 9";
                const auto count = i % 4 == 2 && unit >= 65536 ? 1 : length;
                commands.push_back(fmt::format("write -q {} {} {}", kind, at * unit, count * unit));
            }
            must_qemu_io(name, name.ends_with(".raw") ? "raw" : "qcow2", commands, directory_.path());
        };
        qemu({"create", "-q", "-f", "qcow2", "plain", "37M"});
        write("plain", 37 * MiB, 65536);
        qemu({"create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "small", "3000k"});
        write("small", 3000 * KiB, 512);
        qemu({"create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "extended", "5M"});
        write("extended", 5 * MiB, 2048);
        qemu({"create", "-q", "-f", "qcow2", "-b", "plain", "-F", "qcow2", "top", "40M"});
        write("top", 40 * MiB, 65536);
        // QEMU allocates the first block of a raw file.
        write_file(path("sparse.raw"), "");
        std::filesystem::resize_file(path("sparse.raw"), 9 * MiB + 1536);
        write("sparse.raw", 9 * MiB, 4096);
        qemu({"create", "-q", "-f", "qcow2", "empty", "1T"});
        return {"plain", "small", "extended", "top", "sparse.raw", "empty"};
    }

    /// QEMU's figure is an upper bound, without the holes that preallocated metadata lead to.
    static void expect_bound(const nlohmann::json& qemu, const Target& target, const Measurement& measured) {
        if (target.options.preallocation == Preallocation::metadata) return;
        EXPECT_GE(qemu["required"], measured.required);
    }

    TemporaryDirectory directory_;
};

TEST_F(MeasureTest, AConvertedFileIsAsLong) {
    const auto names = make_sources();
    qemu({"snapshot", "-c", "old", "plain"});
    must_qemu_io("plain", "qcow2", {"write -q -P 3 0 4M", "discard -q 8M 16M"}, directory_.path());
    for (const auto& target : targets()) {
        for (const auto& name : names) {
            for (const std::string snapshot : {"", "old"}) {
                if (!snapshot.empty() && name != "plain") continue;
                if (name == "empty" &&
                    (target.options.preallocation != Preallocation::off || target.options.cluster_size < 4096))
                    continue;
                SCOPED_TRACE(name + " " + target.text + " " + snapshot);
                const auto measured = must(measure({source(name, snapshot), Format::qcow2, target.options}));
                must(convert({.sources = {source(name, snapshot)},
                              .target = NewImage{.path = path("new"), .options = target.options}}));
                EXPECT_EQ(std::filesystem::file_size(path("new")), measured.required);
                EXPECT_LE(measured.required, measured.fully_allocated);
                Arguments theirs = {"measure", "--output=json", "-U", "-O", "qcow2", "-o", target.text};
                if (!snapshot.empty()) theirs.insert(theirs.end(), {"-l", snapshot});
                theirs.push_back(name);
                const auto qemu = qemu_img_json(theirs, directory_.path());
                expect_bound(qemu, target, measured);
                EXPECT_EQ(qemu["fully-allocated"], measured.fully_allocated);
            }
        }
    }
}

TEST_F(MeasureTest, ACreatedFileIsAsLong) {
    for (const auto& target : targets()) {
        for (const std::uint64_t size : {0UL, 512UL, 65536UL, 5 * MiB + 1, 100 * MiB}) {
            SCOPED_TRACE(target.text + " " + std::to_string(size));
            auto options = target.options;
            options.size = size;
            const auto measured = must(measure({.format = Format::qcow2, .options = options}));
            must(create({.image = {.path = path("new"), .options = options}}));
            EXPECT_EQ(std::filesystem::file_size(path("new")), measured.required);
            EXPECT_EQ(measured.bitmaps, std::nullopt);
            const auto qemu = qemu_img_json(
                {"measure", "--output=json", "-O", "qcow2", "-o", target.text, "--size", std::to_string(size)},
                directory_.path());
            expect_bound(qemu, target, measured);
            EXPECT_EQ(qemu["fully-allocated"], measured.fully_allocated);
        }
    }
    EXPECT_EQ(must(measure({.options = {.size = 513}})).required, 1024U);
    EXPECT_TRUE(fails(measure({.options = {.size = low_bits(63)}}), Errc::invalid_argument, {"2^63"}));
}

// The last refcount blocks count themselves, the table, and each other: each length of the file is another case.
TEST_F(MeasureTest, EachLengthOfTheFileIsCountedRight) {
    constexpr std::uint64_t l1_cluster_maps = 64 * 32 * KiB;
    for (const unsigned bits : {16U, 64U}) {
        for (std::uint64_t l1_clusters = 1; l1_clusters < 300; ++l1_clusters) {
            const CreateOptions options{
                .size = l1_clusters * l1_cluster_maps, .cluster_size = 512, .refcount_bits = bits};
            const auto file = memory_storage();
            must(create_image({file, nullptr}, options));
            const auto image = must(open_image(file, {.format = Format::qcow2}));
            const auto report = must(image->check({}));
            ASSERT_TRUE(report.clean()) << bits << " " << l1_clusters << " " << report.corruptions;
            ASSERT_EQ(must(file->size()), must(measure({.format = Format::qcow2, .options = options})).required);
        }
    }
}

TEST_F(MeasureTest, ADataFileIsApart) {
    static_cast<void>(make_sources());
    for (const bool raw : {false, true}) {
        const CreateOptions options{.data_file_name = path(raw ? "raw" : "data"), .data_file_raw = raw};
        const auto measured = must(measure({source("plain"), Format::qcow2, options}));
        must(convert({.sources = {source("plain")}, .target = NewImage{.path = path("new"), .options = options}}));
        EXPECT_EQ(std::filesystem::file_size(path("new")), measured.required);
        EXPECT_THAT(measured.data_file, Optional(std::filesystem::file_size(options.data_file_name)));
    }
}

TEST_F(MeasureTest, ABackingFileMayHaveDataEverywhere) {
    static_cast<void>(make_sources());
    qemu({"create", "-q", "-f", "raw", "base", "37M"});
    must_qemu_io("base", "raw", {"write -q -P 1 0 37M"}, directory_.path());
    for (const unsigned version : {2U, 3U}) {
        const CreateOptions options{
            .version = version, .cluster_size = 4096, .backing_name = path("base"), .backing_format = "raw"};
        const auto measured = must(measure({source("plain"), Format::qcow2, options}));
        must(convert({.sources = {source("plain")}, .target = NewImage{.path = path("new"), .options = options}}));
        EXPECT_EQ(std::filesystem::file_size(path("new")), measured.required);
    }
    // A new overlay stores nothing, and nobody looks for its backing file.
    const auto overlay = must(measure(
        {.format = Format::qcow2, .options = {.size = MiB, .backing_name = "nowhere", .backing_format = "qcow2"}}));
    EXPECT_EQ(overlay.required, 4 * 65536U);
}

TEST_F(MeasureTest, DataThatAreZerosOrCompressedTakeLess) {
    qemu({"create", "-q", "-f", "raw", "disk", "4M"});
    must_qemu_io("disk", "raw", {"write -q -P 0 0 1M", "write -q -P 5 1M 1M"}, directory_.path());
    const auto measured = must(measure({source("disk"), Format::qcow2, {}}));
    const auto converted = [&](bool compress) {
        must(convert({.sources = {source("disk")}, .target = NewImage{.path = path("new")}, .compress = compress}));
        return std::filesystem::file_size(path("new"));
    };
    EXPECT_EQ(measured.required - converted(false), MiB);
    EXPECT_LT(converted(true), measured.required - MiB);
}

TEST_F(MeasureTest, BitmapsAsQemuCountsThem) {
    qemu({"create", "-q", "-f", "qcow2", "disk", "10G"});
    qemu({"bitmap", "--add", "-g", "512", "disk", "fine"});
    qemu({"bitmap", "--add", "-g", "1M", "--disable", "disk", "a coarse one"});
    for (const std::string text : {"cluster_size=64k", "cluster_size=512", "compat=0.10"}) {
        CreateOptions options;
        if (text == "cluster_size=512") options.cluster_size = 512;
        if (text == "compat=0.10") options.version = 2;
        const auto measured = must(measure({source("disk"), Format::qcow2, options}));
        const auto qemu =
            qemu_img_json({"measure", "--output=json", "-O", "qcow2", "-o", text, "disk"}, directory_.path());
        EXPECT_EQ(measured.bitmaps.has_value(), qemu.contains("bitmaps"));
        EXPECT_EQ(measured.bitmaps.value_or(0), qemu.value("bitmaps", 0)) << text;
    }
}

TEST_F(MeasureTest, TakesNoTimeForAVastDisk) {
    for (const auto preallocation : {Preallocation::off, Preallocation::full}) {
        const CreateOptions options{
            .size = bit(61), .version = 3, .cluster_size = 2 * MiB, .refcount_bits = 1, .preallocation = preallocation};
        const auto measured = must(measure({.format = Format::qcow2, .options = options}));
        EXPECT_GT(measured.fully_allocated, bit(61));
    }
    const CreateOptions too_many{
        .size = bit(36), .cluster_size = 512, .refcount_bits = 64, .preallocation = Preallocation::full};
    EXPECT_TRUE(fails(measure({.format = Format::qcow2, .options = too_many}), Errc::limit_exceeded,
                      {"refcount table", "use larger clusters"}));
}

TEST_F(MeasureTest, RefusesWhatConvertRefuses) {
    qemu({"create", "-q", "-f", "qcow2", "disk", "10M"});
    EXPECT_TRUE(fails(measure({source("disk"), Format::qcow2, {.size = MiB}}), Errc::invalid_argument, {"size"}));
    EXPECT_TRUE(fails(measure({source("disk"), Format::raw, {.cluster_size = 512}}), Errc::invalid_argument));
    EXPECT_TRUE(fails(measure({source("disk"), Format::qcow2, {.cluster_size = 3}}), Errc::invalid_argument));
    EXPECT_TRUE(fails(measure({source("disk", "none"), Format::qcow2, {}}), Errc::not_found));
    std::stop_source stop;
    stop.request_stop();
    EXPECT_TRUE(fails(measure({source("disk"), Format::qcow2, {}}, {.stop = stop.get_token()}), Errc::cancelled));
    EXPECT_EQ(must(measure({source("disk"), Format::raw, {.size = 20 * MiB}})).required, 20 * MiB);
}

}  // namespace
}  // namespace qcow
