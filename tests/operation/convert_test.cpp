// Whole conversions, from the names of files to the names of files.

#include "qcow/convert.h"
#include "base/bits.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <future>

#include "base/endian.h"
#include "qcow/stream.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow {
namespace {

using namespace qcow::test;
using testing::ElementsAre;
using testing::IsEmpty;

class ConvertTest : public testing::Test {
protected:
    [[nodiscard]] ImageSpec image(const std::string& name) const { return {.location = {.path = path(name)}}; }
    [[nodiscard]] std::string path(const std::string& name) const { return directory_ / name; }

    /// Makes a raw file of bytes that depend on their place.
    void make_raw(const std::string& name, std::size_t size = MiB, char first = 'a') const {
        std::string bytes(size, '\0');
        for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(first + i / 512 % 20);
        write_file(path(name), bytes);
    }

    void make_overlay(const std::string& name, const std::string& backing, const std::string& format = "raw") const {
        must(create({.image = {.path = path(name), .options = {.backing_name = backing, .backing_format = format}},
                     .size_of_backing = true}));
    }

    /// Into a new raw file, unless the test changes that.
    [[nodiscard]] ConvertJob job(const std::string& source, const std::string& target) const {
        return {.sources = {{image(source)}}, .target = NewImage{.path = path(target), .format = Format::raw}};
    }

    [[nodiscard]] ConvertJob into_existing(const std::string& source, const std::string& target) const {
        auto result = job(source, target);
        result.target = ConvertJob::ExistingTarget{.image = image(target)};
        return result;
    }

    [[nodiscard]] std::string contents(const std::string& name) const {
        const auto opened = must(open_image(image(name)));
        std::string bytes(opened->size(), '\0');
        must(opened->read({0}, std::as_writable_bytes(std::span(bytes))));
        return bytes;
    }

    TemporaryDirectory directory_;
};

TEST_F(ConvertTest, MakesWhatTheJobSays) {
    make_raw("source");
    auto to_qcow2 = job("source", "disk.qcow2");
    to_qcow2.target = NewImage{.path = path("disk.qcow2"), .options = {.cluster_size = 4096}};
    to_qcow2.compress = true;
    const auto made = must(convert(to_qcow2));
    EXPECT_EQ(made.path, path("disk.qcow2"));
    EXPECT_EQ(made.bytes, MiB);
    EXPECT_EQ(made.losses.bytes, 0U);
    EXPECT_THAT(made.warnings, IsEmpty());
    EXPECT_EQ(must(must(open_image(image("disk.qcow2")))->info()).cluster_size, 4096U);
    must(convert(job("disk.qcow2", "back")));
    EXPECT_EQ(read_file(path("back")), read_file(path("source")));
}

TEST_F(ConvertTest, JoinsSources) {
    make_raw("a", 512, 'a');
    make_raw("b", 700, 'b');
    auto both = job("a", "target");
    both.sources.push_back({image("b")});
    EXPECT_EQ(must(convert(both)).bytes, 512U + 1024U);
    EXPECT_EQ(read_file(path("target")), read_file(path("a")) + read_file(path("b")) + std::string(324, '\0'));
}

TEST_F(ConvertTest, StoresOnlyWhatDiffersFromABackingFile) {
    make_raw("base");
    auto bytes = read_file(path("base"));
    bytes[70'000] = 'X';
    write_file(path("source"), bytes);
    auto over = job("source", "overlay");
    over.target = NewImage{.path = path("overlay"), .options = {.backing_name = "base", .backing_format = "raw"}};
    must(convert(over));
    EXPECT_EQ(contents("overlay"), bytes);
    EXPECT_EQ(must(measure_usage(*must(open_image(image("overlay"))))).layers.at(0).data_bytes, 65536U);

    make_overlay("existing", "base");
    auto into = into_existing("source", "existing");
    std::get<ConvertJob::ExistingTarget>(into.target).backing = Location{.path = path("base")};
    must(convert(into));
    EXPECT_EQ(contents("existing"), bytes);
    EXPECT_LE(must(measure_usage(*must(open_image(image("existing"))))).layers.at(0).data_bytes, 65536U);
}

// ---- What is refused ----

TEST_F(ConvertTest, OverwritesNothingThatItReads) {
    make_raw("base");
    make_raw("other");
    make_overlay("source", "base");
    const auto before = read_file(path("base"));
    const auto never = [&](const ConvertJob& refused) {
        const auto names = directory_.names();
        EXPECT_TRUE(fails(convert(refused), Errc::invalid_argument, {"would overwrite"}));
        EXPECT_EQ(read_file(path("base")), before);
        EXPECT_EQ(directory_.names(), names);
    };
    for (const auto* target : {"source", "base"}) {
        never(job("source", target));
        // The backing file that the source names is its own, whatever is read in its place.
        auto replaced = job("source", target);
        replaced.sources[0].image.backing = Location{.path = path("other")};
        never(replaced);
        auto alone = job("source", target);
        alone.sources[0].image.location.alone = true;
        never(alone);
    }
    never(into_existing("source", "base"));
    auto over_base = job("other", "base");
    over_base.target = NewImage{.path = path("base"), .options = {.backing_name = "source", .backing_format = "qcow2"}};
    never(over_base);
    auto same_twice = job("other", "new");
    same_twice.target = NewImage{.path = path("new"), .options = {.data_file_name = "new"}};
    never(same_twice);
}

TEST_F(ConvertTest, RefusesWhatCannotBe) {
    make_raw("source");
    make_raw("small", 512);
    make_overlay("overlay", "source");
    const auto refuses = [&](const ConvertJob& refused, std::string_view why) {
        EXPECT_TRUE(fails(convert(refused), Errc::invalid_argument, {why}));
    };
    refuses({.sources = {}, .target = NewImage{.path = path("target")}}, "nothing to convert");
    auto compressed_raw = job("source", "target");
    compressed_raw.compress = true;
    refuses(compressed_raw, "it has no compression");
    refuses(into_existing("source", "small"), "512 bytes");
    auto zeros_over_backing = into_existing("small", "overlay");
    auto& target = std::get<ConvertJob::ExistingTarget>(zeros_over_backing.target);
    target.backing = Location{.path = path("source")};
    target.reads_as_zeros = true;
    refuses(zeros_over_backing, "reads as that and not as zeros");
    target.reads_as_zeros = false;
    target.backing = Location{.path = path("small")};
    refuses(zeros_over_backing, "its backing file is");
    auto without_format = job("source", "target");
    without_format.target = NewImage{.path = path("target"), .options = {.backing_name = "source"}};
    refuses(without_format, "its format is to be recorded");
    EXPECT_THAT(directory_.names(), ElementsAre("overlay", "small", "source"));
}

TEST_F(ConvertTest, MakesImageAndDataFileOrNeither) {
    make_raw("source");
    write_file(path("data"), "something");
    auto both = job("source", "image");
    both.target = NewImage{.path = path("image"), .options = {.data_file_name = "data"}};
    EXPECT_TRUE(fails(convert(both), Errc::invalid_argument, {"data file", "not empty"}));
    EXPECT_THAT(directory_.names(), ElementsAre("data", "source"));
    EXPECT_EQ(read_file(path("data")), "something");
    write_file(path("data"), "");
    must(convert(both));
    EXPECT_EQ(read_file(path("data")), read_file(path("source")));
    EXPECT_EQ(contents("image"), read_file(path("source")));
}

// ---- Salvage and warnings ----

TEST_F(ConvertTest, ReturnsWhatWasLost) {
    make_raw("source");
    auto to_qcow2 = job("source", "disk");
    to_qcow2.target = NewImage{.path = path("disk")};
    must(convert(to_qcow2));
    // The second cluster of the disk lies nowhere in the file.
    const auto header = must(must(open_image(image("disk")))->info());
    ASSERT_EQ(header.cluster_size, 65536U);
    {
        const auto file = must(open_file(path("disk"), {.writable = true}));
        std::array<std::byte, 8> l1 = {};
        must(file->read({40}, l1));  // header field l1_table_offset
        must(file->read({load_be<std::uint64_t>(l1, 0)}, l1));
        const HostOffset entry{(load_be<std::uint64_t>(l1, 0) & 0x00ff'ffff'ffff'fe00) + 8};
        must(file->write(entry, std::array{std::byte{0x80}, std::byte{0x7f}}));
    }
    EXPECT_TRUE(fails(convert(job("disk", "saved")), Errc::corrupt));
    auto salvage = job("disk", "saved");
    salvage.salvage = true;
    const auto saved = must(convert(salvage));
    EXPECT_EQ(saved.losses.bytes, 65536U);
    ASSERT_EQ(saved.losses.ranges.size(), 1U);
    EXPECT_EQ(saved.losses.ranges[0].bytes.start.value, 65536U);
    const auto expected = read_file(path("source")).replace(65536, 65536, 65536, '\0');
    EXPECT_EQ(read_file(path("saved")), expected);
}

TEST_F(ConvertTest, ReturnsItsWarnings) {
    make_raw("source");
    std::vector<Warning::Kind> told;
    const JobControl control{.warn = [&](const Warning& warning) { told.push_back(warning.kind); }};
    const auto named = must(convert(job("source", "disk.qcow2"), control));
    ASSERT_EQ(named.warnings.size(), 1U);
    EXPECT_EQ(named.warnings[0].kind, Warning::Kind::misleading_name);
    EXPECT_EQ(named.warnings[0].format, Format::qcow2);
    EXPECT_THAT(named.warnings[0].message, testing::HasSubstr("disk.qcow2"));

    make_raw("existing");
    const auto guessed = must(convert(into_existing("source", "existing"), control));
    ASSERT_EQ(guessed.warnings.size(), 1U);
    EXPECT_EQ(guessed.warnings[0].kind, Warning::Kind::guessed_format);
    EXPECT_EQ(guessed.warnings[0].format, Format::raw);
    EXPECT_THAT(told, ElementsAre(Warning::Kind::misleading_name, Warning::Kind::guessed_format));
}

// ---- Progress and cancellation ----

TEST_F(ConvertTest, TellsItsProgressInBytes) {
    make_raw("source", 3 * MiB);
    std::uint64_t last = 0;
    must(convert(job("source", "target"), {.progress = [&](std::uint64_t done, std::uint64_t total) {
                     EXPECT_GT(done, last);
                     EXPECT_EQ(total, 3 * MiB);
                     last = done;
                 }}));
    EXPECT_EQ(last, 3 * MiB);
}

TEST_F(ConvertTest, LeavesNothingWhenItIsCancelled) {
    make_raw("source", 64 * MiB);
    make_raw("replaced");
    const auto before = read_file(path("replaced"));
    for (const unsigned workers : {1U, 4U}) {
        for (const bool compress : {false, true}) {
            auto cancelled = job("source", "replaced");
            cancelled.target =
                NewImage{.path = path("replaced"), .options = {.data_file_name = compress ? "" : "data"}};
            cancelled.compress = compress;
            cancelled.workers = workers;
            cancelled.sparse_bytes = 0;  // so that nothing is left to the kernel
            std::stop_source stop;
            unsigned pieces = 0;
            const JobControl control{.progress =
                                         [&](std::uint64_t, std::uint64_t) {
                                             stop.request_stop();
                                             ++pieces;
                                         },
                                     .stop = stop.get_token()};
            EXPECT_TRUE(fails(convert(cancelled, control), Errc::cancelled));
            // Each worker finishes what it has.
            EXPECT_LE(pieces, 4 * workers);
            EXPECT_THAT(directory_.names(), ElementsAre("replaced", "source"));
            EXPECT_EQ(read_file(path("replaced")), before);
        }
    }
}

TEST_F(ConvertTest, BeginsNothingWhenItIsCancelledBefore) {
    make_raw("source");
    std::stop_source stop;
    stop.request_stop();
    EXPECT_TRUE(fails(convert(job("source", "target"), {.stop = stop.get_token()}), Errc::cancelled));
    EXPECT_THAT(directory_.names(), ElementsAre("source"));
}

TEST_F(ConvertTest, IsCancelledAmongVastZerosToo) {
    constexpr std::uint64_t size = std::uint64_t{1} << 40;
    for (const auto* name : {"source", "target"})
        must(create({.image = {.path = path(name), .options = {.size = size}}}));
    std::stop_source stop;
    std::uint64_t reached = 0;
    const JobControl control{.progress =
                                 [&](std::uint64_t done, std::uint64_t) {
                                     stop.request_stop();
                                     reached = done;
                                 },
                             .stop = stop.get_token()};
    EXPECT_TRUE(fails(convert(into_existing("source", "target"), control), Errc::cancelled,
                      {"target holds only a part of the source"}));
    EXPECT_LT(reached, size / 2);
    EXPECT_TRUE(must(check(image("target"))).report.clean());
}

// ---- Streams ----

TEST_F(ConvertTest, WritesIntoAPipe) {
    make_raw("source", 3 * MiB + 100);
    const auto pipe = path("pipe");
    ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
    EXPECT_TRUE(is_stream(pipe));
    EXPECT_TRUE(is_stream("-"));
    EXPECT_FALSE(is_stream(path("source")));
    EXPECT_FALSE(is_stream(path("absent")));
    auto reader = std::async(std::launch::async, [&] { return read_file(pipe); });
    auto streamed = job("source", "");
    streamed.target = ConvertJob::StreamTarget{pipe};
    must(convert(streamed));
    EXPECT_EQ(reader.get(), read_file(path("source")) + std::string(412, '\0'));

    streamed.salvage = true;
    EXPECT_TRUE(fails(convert(streamed), Errc::invalid_argument, {"takes the data alone"}));
}

TEST_F(ConvertTest, StreamsAreCancelled) {
    make_raw("source", 3 * MiB);
    const auto disk = must(open_image(image("source")));
    const int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    std::stop_source stop;
    std::uint64_t reached = 0;
    const JobControl control{.progress =
                                 [&](std::uint64_t done, std::uint64_t total) {
                                     EXPECT_EQ(total, 3 * MiB);
                                     reached = done;
                                     stop.request_stop();
                                 },
                             .stop = stop.get_token()};
    EXPECT_TRUE(fails(copy_to_stream(*disk, {{0}, disk->size()}, null, "null", control), Errc::cancelled));
    EXPECT_EQ(reached, MiB);
    close(null);
}

}  // namespace
}  // namespace qcow
