// What convert, create and resize make of sizes, of zeros, and of what cannot be read.

#include <nlohmann/json.hpp>

#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

class ConvertTest : public ToolTest {
protected:
    void must_img(const Arguments& arguments) const { must_qemu_img(arguments, directory_.path()); }

    [[nodiscard]] std::uint64_t virtual_size(const std::string& image) const {
        return qemu_img_json({"info", "--output=json", image}, directory_.path())["virtual-size"];
    }

    /// What QEMU reads.
    [[nodiscard]] std::string contents(const std::string& image, const std::string& format = "qcow2") const {
        qemu_convert_to_raw(image, format, "contents.raw", {}, directory_.path());
        return bytes_of("contents.raw");
    }

    void expect_sound(const std::string& image) const {
        EXPECT_EQ(qemu_img({"check", "-f", "qcow2", image}, directory_.path()).status, 0) << image;
        EXPECT_EQ(tool({"check", image}).status, 0) << image;
    }

    /// Bytes that a file occupies.
    [[nodiscard]] std::uint64_t occupied(const std::string& file) const {
        return qemu_img_json({"info", "--output=json", "-f", "raw", file}, directory_.path())["actual-size"];
    }

    /// QEMU's map, without where the data lie.
    [[nodiscard]] json map_of(const std::string& image, const std::string& format) const {
        auto map = qemu_img_json({"map", "--output=json", "-f", format, image}, directory_.path());
        for (auto& extent : map) extent.erase("offset");
        return map;
    }

    void make_sparse(const std::string& name, std::uint64_t size) const {
        put_file(directory_.file(name), "");
        std::filesystem::resize_file(directory_.file(name), size);
        auto bytes = Random(8).bytes(70'000);
        std::fstream file(directory_.file(name), std::ios::in | std::ios::out | std::ios::binary);
        file.seekp(1 << 20);
        file << bytes;
        file.seekp(3 << 20);
        file << std::string(300'000, '\0') << "end";
    }
};

// ---- sizes ----

constexpr std::size_t odd = 100'001;
constexpr std::size_t rounded = 100'352;

/// Whatever is made has whole sectors, and zeros behind the last byte.
TEST_F(ConvertTest, OddSizesAreRoundedUp) {
    const auto source = Random(1).bytes(odd);
    const auto expected = source + std::string(rounded - odd, '\0');
    put_file(directory_.file("odd.raw"), source);
    put_file(directory_.file("base.raw"), std::string(1 << 20, 'x'));
    const std::vector<Arguments> ways = {{},
                                         {"-S", "0"},
                                         {"-c"},
                                         {"-o", "cluster_size=512"},
                                         {"-o", "compat=0.10"},
                                         {"-o", "size=100001"},
                                         {"-o", "size=100352"},
                                         {"-o", "preallocation=metadata"},
                                         {"-o", "data_file=data"},
                                         {"-o", "data_file=raw_data,data_file_raw=on"},
                                         {"-o", "extended_l2=on"},
                                         {"-B", "base.raw", "-F", "raw"},
                                         {"-B", "base.raw", "-F", "raw", "-c", "-o", "cluster_size=4k"}};
    for (const auto& way : ways) {
        SCOPED_TRACE(testing::PrintToString(way));
        Arguments arguments = {"convert", "-f", "raw", "-O", "qcow2", "odd.raw", "made.qcow2"};
        arguments.insert(arguments.begin() + 1, way.begin(), way.end());
        must_tool(arguments);
        expect_sound("made.qcow2");
        EXPECT_EQ(virtual_size("made.qcow2"), rounded);
        EXPECT_TRUE(contents("made.qcow2") == expected);
        must_tool({"convert", "made.qcow2", "again.raw"});
        EXPECT_TRUE(bytes_of("again.raw") == expected);
    }
    for (const Arguments& way : {Arguments{}, {"-S", "0"}, {"-o", "preallocation=falloc"}}) {
        Arguments arguments = {"convert", "-f", "raw", "odd.raw", "made.raw"};
        arguments.insert(arguments.begin() + 1, way.begin(), way.end());
        must_tool(arguments);
        EXPECT_TRUE(bytes_of("made.raw") == expected) << testing::PrintToString(way);
    }
    const auto streamed = run({"sh", "-c", QCOW_TOOL " convert -f raw odd.raw - > stream.raw"}, directory_.path());
    EXPECT_EQ(streamed.status, 0) << streamed.text();
    EXPECT_TRUE(bytes_of("stream.raw") == expected);
    // Larger than the source, and the backing file does not come to light.
    must_tool({"convert", "-f", "raw", "-O", "qcow2", "-o", "size=300001", "-B", "base.raw", "-F", "raw", "odd.raw",
               "made.qcow2"});
    EXPECT_TRUE(contents("made.qcow2") == source + std::string(300'032 - odd, '\0'));
    must_tool({"convert", "-f", "raw", "-o", "size=300001", "odd.raw", "made.raw"});
    EXPECT_TRUE(bytes_of("made.raw") == source + std::string(300'032 - odd, '\0'));
    for (const std::string format : {"raw", "qcow2"}) {
        expect_refusal({"convert", "-f", "raw", "-O", format, "-o", "size=97k", "odd.raw", "small"},
                       AllOf(HasSubstr("size"), HasSubstr("100001")));
    }
}

TEST_F(ConvertTest, OddSizesOfNewImagesAreRoundedUp) {
    put_file(directory_.file("odd.raw"), std::string(odd, 'x'));
    EXPECT_THAT(must_tool({"create", "new.qcow2", "100001"}).out, HasSubstr("100352"));
    EXPECT_EQ(virtual_size("new.qcow2"), rounded);
    must_tool({"create", "-o", "size=100001", "new.qcow2"});
    EXPECT_EQ(virtual_size("new.qcow2"), rounded);
    must_tool({"create", "-f", "raw", "new.raw", "100001"});
    EXPECT_EQ(bytes_of("new.raw"), std::string(rounded, '\0'));
    must_tool({"create", "-b", "odd.raw", "-F", "raw", "new.qcow2"});
    EXPECT_EQ(virtual_size("new.qcow2"), rounded);
    EXPECT_TRUE(contents("new.qcow2") == std::string(odd, 'x') + std::string(rounded - odd, '\0'));
    EXPECT_EQ(must_tool({"create", "new.qcow2", "1024"}).err, "");
}

/// An image whose header says an odd size, as older programs have made them.
TEST_F(ConvertTest, OddImagesThatAreThereAreReadToTheirLastByte) {
    const auto data = Random(2).bytes(rounded);
    put_file(directory_.file("data.raw"), data);
    must_img({"create", "-q", "-f", "qcow2", "odd.qcow2", std::to_string(rounded)});
    must_img({"convert", "-n", "-f", "raw", "-O", "qcow2", "data.raw", "odd.qcow2"});
    must_img({"snapshot", "-c", "s", "odd.qcow2"});
    auto bytes = bytes_of("odd.qcow2");
    bytes.replace(24, 8, std::string("\0\0\0\0\0\x01\x86\xa1", 8));
    // The snapshot's size is in its extra data.
    std::uint64_t table = 0;
    for (int i = 64; i < 72; ++i) table = table << 8 | static_cast<unsigned char>(bytes[static_cast<std::size_t>(i)]);
    bytes.replace(table + 48, 8, std::string("\0\0\0\0\0\x01\x86\xa1", 8));
    put_file(directory_.file("odd.qcow2"), bytes);
    const auto expected = data.substr(0, odd) + std::string(rounded - odd, '\0');

    EXPECT_EQ(must_tool({"read", "odd.qcow2", "0", std::to_string(odd)}).out, data.substr(0, odd));
    EXPECT_EQ(json::parse(must_tool({"map", "--json", "odd.qcow2"}).out).back()["length"], odd);
    for (const Arguments& snapshot : {Arguments{}, {"-l", "s"}}) {
        Arguments arguments = {"convert", "odd.qcow2", "made.raw"};
        arguments.insert(arguments.begin() + 1, snapshot.begin(), snapshot.end());
        must_tool(arguments);
        EXPECT_TRUE(bytes_of("made.raw") == expected);
        arguments.back() = "made.qcow2";
        arguments.insert(arguments.begin() + 1, {"-O", "qcow2", "-c"});
        must_tool(arguments);
        EXPECT_TRUE(contents("made.qcow2") == expected);
    }
    // Larger, they have zeros behind their last byte.
    std::filesystem::copy(directory_.file("odd.qcow2"), directory_.file("larger.qcow2"));
    must_tool({"resize", "larger.qcow2", "1M"});
    EXPECT_TRUE(contents("larger.qcow2") == expected + std::string((1 << 20) - rounded, '\0'));
    // Into them, and from them into larger ones, the rest of whose sector becomes zeros as in QEMU.
    put_file(directory_.file("new.raw"), Random(3).bytes(odd));
    must_tool({"convert", "-n", "-f", "raw", "new.raw", "odd.qcow2"});
    EXPECT_EQ(must_tool({"read", "odd.qcow2", "0", std::to_string(odd)}).out, bytes_of("new.raw"));
    for (const Arguments& compress : {Arguments{}, {"-c"}}) {
        put_file(directory_.file("old.raw"), std::string(200'704, 'x'));
        must_img({"convert", "-f", "raw", "-O", "qcow2", "old.raw", "old.qcow2"});
        Arguments arguments = {"convert", "-n", "-f", "raw", "new.raw", "old.qcow2"};
        arguments.insert(arguments.begin() + 1, compress.begin(), compress.end());
        must_tool(arguments);
        EXPECT_TRUE(contents("old.qcow2") ==
                    bytes_of("new.raw") + std::string(rounded - odd, '\0') + std::string(200'704 - rounded, 'x'));
    }
}

TEST_F(ConvertTest, ResizeRoundsUpAndSaysSo) {
    put_file(directory_.file("disk.raw"), std::string(1024, 'x'));
    must_img({"create", "-q", "-f", "qcow2", "disk.qcow2", "1M"});
    for (const std::string name : {"disk.qcow2", "disk.raw"}) {
        const auto size = [&] {
            return json::parse(must_tool({"info", "--json", "-f", name.substr(5), name}).out)["virtual-size"]
                .get<std::uint64_t>();
        };
        const auto resize = [&](const std::string& to, std::uint64_t expected) {
            const auto finished = tool({"resize", "--shrink", "-f", name.substr(5), name, to});
            EXPECT_EQ(finished.status, 0) << finished.text();
            EXPECT_THAT(finished.err,
                        AllOf(HasSubstr(name), HasSubstr("multiple of 512"), HasSubstr(std::to_string(expected))));
            EXPECT_EQ(size(), expected);
        };
        resize("2000001", 2'000'384);
        resize("+1", 2'000'896);
        resize("-513", 2'000'384);
        must_tool({"resize", "-f", name.substr(5), name, "4M"});
        EXPECT_EQ(size(), 4U << 20);
        // Nothing is lost.
        EXPECT_EQ(tool({"resize", "-f", name.substr(5), name, "4194303"}).status, 0);
        expect_refusal({"resize", "-f", name.substr(5), name, "4193792"}, HasSubstr("--shrink"));
    }
}

// ---- zeros and preallocation ----

TEST_F(ConvertTest, EveryByteIsWrittenWhereItIsAskedFor) {
    make_sparse("disk.raw", 8 << 20);
    for (const std::string format : {"raw", "qcow2"}) {
        must_tool({"convert", "-f", "raw", "-O", format, "-S", "0", "disk.raw", "ours"});
        must_img({"convert", "-f", "raw", "-O", format, "-S", "0", "disk.raw", "theirs"});
        EXPECT_EQ(map_of("ours", format), map_of("theirs", format));
        EXPECT_GE(occupied("ours"), 8U << 20);
        EXPECT_TRUE(contents("ours", format) == bytes_of("disk.raw"));
    }
    must_tool({"convert", "-f", "raw", "-O", "qcow2", "-c", "-S", "0", "disk.raw", "ours"});
    must_img({"convert", "-f", "raw", "-O", "qcow2", "-c", "-S", "0", "disk.raw", "theirs"});
    EXPECT_EQ(map_of("ours", "qcow2"), map_of("theirs", "qcow2"));
    EXPECT_TRUE(contents("ours") == bytes_of("disk.raw"));
    expect_sound("ours");
}

TEST_F(ConvertTest, WhatIsAllocatedStaysWithoutHoles) {
    make_sparse("disk.raw", 8 << 20);
    for (const std::string format : {"raw", "qcow2"}) {
        for (const Arguments& options :
             {Arguments{}, {"-S", "0"}, {"--target-is-zero"}, {"-S", "0", "--target-is-zero"}}) {
            SCOPED_TRACE(format + testing::PrintToString(options));
            for (const std::string name : {"ours", "theirs"}) {
                must_img({"create", "-q", "-f", format, "-o", "preallocation=full", name, "8M"});
            }
            Arguments arguments = {"convert", "-n", "-f", "raw", "-O", format, "disk.raw", "ours"};
            arguments.insert(arguments.begin() + 1, options.begin(), options.end());
            must_tool(arguments);
            arguments.back() = "theirs";
            must_img(arguments);
            EXPECT_EQ(occupied("ours") > (8U << 20) - 1, occupied("theirs") > (8U << 20) - 1);
            EXPECT_TRUE(contents("ours", format) == bytes_of("disk.raw"));
        }
    }
}

TEST_F(ConvertTest, PreallocationIsAsInQemu) {
    make_sparse("disk.raw", 8 << 20);
    const auto compare = [&](const std::string& format, const std::string& options) {
        SCOPED_TRACE(format + " " + options);
        must_tool({"convert", "-f", "raw", "-O", format, "-o", options, "disk.raw", "ours"});
        must_img({"convert", "-f", "raw", "-O", format, "-o", options, "disk.raw", "theirs"});
        EXPECT_TRUE(contents("ours", format) == bytes_of("disk.raw"));
        // All of the disk has a place, and what of it takes space agrees but for the metadata.
        const auto ours = static_cast<double>(occupied("ours"));
        EXPECT_NEAR(ours, static_cast<double>(occupied("theirs")), 600'000);
        if (format == "raw") return;
        expect_sound("ours");
        const auto check = [&](const std::string& image) {
            return qemu_img_json({"check", "--output=json", image}, directory_.path())["allocated-clusters"];
        };
        EXPECT_EQ(check("ours"), check("theirs"));
    };
    for (const std::string how : {"off", "falloc", "full"}) compare("raw", "preallocation=" + how);
    for (const std::string how : {"off", "metadata", "falloc", "full"}) {
        for (const std::string more : {"", ",cluster_size=4k", ",compat=0.10", ",extended_l2=on"})
            compare("qcow2", "preallocation=" + how + more);
    }
    // With subclusters also over a backing file, which stays visible, and data over it.
    put_file(directory_.file("backing.raw"), bytes_of("disk.raw").replace(2 << 20, 200'000, 200'000, 'x'));
    for (const std::string how : {"metadata", "falloc", "full"}) {
        must_run({"fallocate", "--dig-holes", "backing.raw"}, directory_.path());
        const auto options = "extended_l2=on,preallocation=" + how;
        must_tool({"convert", "-f", "raw", "-O", "qcow2", "-B", "backing.raw", "-F", "raw", "-o", options, "disk.raw",
                   "ours"});
        expect_sound("ours");
        EXPECT_TRUE(contents("ours") == bytes_of("disk.raw"));
        EXPECT_EQ(occupied("ours") >= 8U << 20, how != "metadata");
        must_qemu_io("backing.raw", "raw", {"write -q -P 90 6M 64k"}, directory_.path());
        EXPECT_TRUE(contents("ours").substr(6 << 20, 65536) == std::string(65536, 'Z')) << how;
        must_qemu_io("backing.raw", "raw", {"write -q -P 0 6M 64k"}, directory_.path());
    }
    must_tool({"convert", "-f", "raw", "-O", "qcow2", "-o", "preallocation=falloc,data_file=data", "disk.raw", "ours"});
    EXPECT_GE(occupied("data"), 8U << 20);
    EXPECT_TRUE(contents("ours") == bytes_of("disk.raw"));
    expect_refusal({"convert", "-f", "raw", "-o", "preallocation=metadata", "disk.raw", "no"}, HasSubstr("metadata"));
    expect_refusal({"convert", "-f", "raw", "-o", "cluster_size=4k", "disk.raw", "no"}, HasSubstr("qcow2"));
    expect_refusal({"convert", "-c", "-O", "qcow2", "-o", "preallocation=full", "base.qcow2", "no"},
                   HasSubstr("preallocation"));
    expect_refusal({"create", "-f", "raw", "-o", "cluster_size=4k", "no", "1M"}, HasSubstr("qcow2"));
    EXPECT_FALSE(files().contains("no"));
}

/// With a raw data file, the image has no unmapped clusters that would hide what the file holds.
TEST_F(ConvertTest, ARawDataFileIsMappedWhole) {
    make_sparse("disk.raw", 8 << 20);
    must_tool(
        {"convert", "-f", "raw", "-O", "qcow2", "-o", "data_file=data,data_file_raw=on", "disk.raw", "made.qcow2"});
    expect_sound("made.qcow2");
    EXPECT_TRUE(bytes_of("data") == bytes_of("disk.raw"));
    must_qemu_io("data", "raw", {"write -q -P 90 6M 64k"}, directory_.path());
    EXPECT_TRUE(contents("made.qcow2").substr(6 << 20, 65536) == std::string(65536, 'Z'));
}

/// Any layout, of any size, by any of the options: QEMU finds the same bytes.
TEST_F(ConvertTest, ConversionsAreEqualToTheirSource) {
    auto random = Random::named("conversions");
    SCOPED_TRACE(replay_hint());
    for (int round = 0; round < 12; ++round) {
        const auto size = random.between(1, 3 << 20);
        std::string source(size, '\0');
        for (auto n = random.below(6); n > 0; --n) {
            const auto at = random.below(size);
            const auto length = std::min<std::size_t>(size - at, random.between(1, 400'000));
            source.replace(at, length, random.chance(30) ? std::string(length, '\0') : random.bytes(length));
        }
        auto base = source.substr(0, random.between(1, size));
        base.replace(random.below(base.size()), 1, "x");
        put_file(directory_.file("source.raw"), source);
        put_file(directory_.file("backing.raw"), base);
        must_run({"fallocate", "--dig-holes", "source.raw"}, directory_.path());

        const bool raw = random.chance(30);
        Arguments arguments = {"convert", "-f", "raw", "-O", raw ? "raw" : "qcow2"};
        const auto add = [&](unsigned percent, const Arguments& words) {
            if (random.chance(percent)) arguments.insert(arguments.end(), words.begin(), words.end());
        };
        add(30, {"-S", random.pick<std::string>({"0", "512", "64k"})});
        add(30, {"--salvage"});
        add(50, {"-m", std::to_string(random.between(1, 4))});
        if (raw) {
            add(50, {"-o", "preallocation=" + random.pick<std::string>({"off", "falloc", "full"})});
        } else {
            add(70, {"-o", "cluster_size=" + random.pick<std::string>({"512", "4k", "64k", "1M"})});
            add(30, {"-o", "compat=0.10"});
            if (random.chance(50)) {
                add(50, {"-B", "backing.raw", "-F", "raw"});
                add(50, {"-c"});
            } else {
                add(70, {"-o", "preallocation=" + random.pick<std::string>({"metadata", "falloc", "full"})});
            }
        }
        arguments.insert(arguments.end(), {"source.raw", "target"});
        SCOPED_TRACE(testing::PrintToString(arguments));
        must_tool(arguments);
        if (!raw) expect_sound("target");
        const auto compared =
            qemu_img({"compare", "-f", "raw", "-F", raw ? "raw" : "qcow2", "source.raw", "target"}, directory_.path());
        EXPECT_EQ(compared.status, 0) << compared.text();
        if (testing::Test::HasFailure()) return;
    }
}

// ---- into an overlay ----

TEST_F(ConvertTest, AnOverlayThatIsThereTakesOnlyWhatDiffers) {
    must_img({"create", "-q", "-f", "qcow2", "base8.qcow2", "8M"});
    must_qemu_io("base8.qcow2", "qcow2", {"write -q -P 119 0 7M"}, directory_.path());
    must_img({"create", "-q", "-f", "qcow2", "-b", "base8.qcow2", "-F", "qcow2", "source.qcow2"});
    must_qemu_io("source.qcow2", "qcow2", {"write -q -P 17 1M 64k", "write -q -z 3M 100k", "write -q -z 7M 1M"},
                 directory_.path());
    std::filesystem::create_symlink("base8.qcow2", directory_.file("link.qcow2"));
    const auto expected = contents("source.qcow2");
    for (const Arguments& way : {Arguments{}, {"-F", "qcow2"}, {"-c"}, {"-m", "1"}, {"-S", "0"}}) {
        for (const std::string base : {"base8.qcow2", "./link.qcow2"}) {
            SCOPED_TRACE(testing::PrintToString(way) + base);
            must_img({"create", "-q", "-f", "qcow2", "-b", "base8.qcow2", "-F", "qcow2", "over.qcow2"});
            // What it has of its own is replaced where the source says otherwise.
            must_qemu_io("over.qcow2", "qcow2", {"write -q -P 99 5M 64k"}, directory_.path());
            Arguments arguments = {"convert", "-n", "-B", base, "source.qcow2", "over.qcow2"};
            arguments.insert(arguments.begin() + 1, way.begin(), way.end());
            must_tool(arguments);
            expect_sound("over.qcow2");
            EXPECT_TRUE(contents("over.qcow2") == expected);
            const auto check = qemu_img_json({"check", "--output=json", "over.qcow2"}, directory_.path());
            EXPECT_LE(check["allocated-clusters"], 5);
        }
    }
}

TEST_F(ConvertTest, TheBackingFileOfAnOverlayThatIsThereIsNotAnother) {
    std::filesystem::copy(directory_.file("base.qcow2"), directory_.file("copy.qcow2"));
    must_img({"create", "-q", "-f", "qcow2", "alone.qcow2", "4M"});
    const auto before = bytes_of("top.qcow2");
    expect_refusal({"convert", "-n", "-B", "copy.qcow2", "copy.qcow2", "top.qcow2"},
                   AllOf(HasSubstr("top.qcow2"), HasSubstr("base.qcow2"), HasSubstr("copy.qcow2")));
    expect_refusal({"convert", "-n", "-B", "base.qcow2", "-F", "raw", "copy.qcow2", "top.qcow2"}, HasSubstr("-F"));
    expect_refusal({"convert", "-n", "-B", "absent", "copy.qcow2", "top.qcow2"}, HasSubstr("absent"));
    expect_refusal({"convert", "-n", "-F", "qcow2", "copy.qcow2", "top.qcow2"}, HasSubstr("-B"));
    expect_refusal({"convert", "-n", "-B", "base.qcow2", "copy.qcow2", "alone.qcow2"}, HasSubstr("no backing file"));
    expect_refusal({"convert", "-n", "--target-is-zero", "-B", "base.qcow2", "copy.qcow2", "top.qcow2"},
                   HasSubstr("--target-is-zero"));
    EXPECT_TRUE(bytes_of("top.qcow2") == before);
}

// ---- salvage ----

TEST_F(ConvertTest, SalvageListsWhatItLostAndKeepsTheRest) {
    auto expected = contents("base.qcow2");
    corrupt_l2_entry();
    std::ranges::fill(std::span(expected).first(65536), '\0');
    for (const Arguments& how : {Arguments{}, {"-O", "qcow2"}, {"-O", "qcow2", "-c"}, {"-S", "0"}}) {
        SCOPED_TRACE(testing::PrintToString(how));
        Arguments arguments = {"convert", "--salvage", "--json", "base.qcow2", "saved"};
        arguments.insert(arguments.begin() + 1, how.begin(), how.end());
        const auto finished = tool(arguments);
        EXPECT_EQ(finished.status, 3) << finished.text();
        EXPECT_THAT(finished.err,
                    AllOf(HasSubstr("0x0 to 0xffff (64 KiB)"), HasSubstr("L2 entry"), HasSubstr("saved: 64 KiB")));
        const auto summary = json::parse(finished.out);
        EXPECT_EQ(summary["lost-bytes"], 65536);
        EXPECT_EQ(summary["unlisted-lost-bytes"], 0);
        ASSERT_EQ(summary["lost"].size(), 1);
        EXPECT_EQ(summary["lost"][0]["start"], 0);
        EXPECT_EQ(summary["lost"][0]["length"], 65536);
        EXPECT_EQ(summary["lost"][0]["reason"], "corrupt");
        const bool raw = how.empty() || how[0] == "-S";
        EXPECT_TRUE(contents("saved", raw ? "raw" : "qcow2") == expected);
    }
    // Also through an overlay, out of a snapshot, behind another source and into what is there.
    must_img({"create", "-q", "-f", "qcow2", "there.qcow2", "4M"});
    must_qemu_io("there.qcow2", "qcow2", {"write -q -P 99 0 1M"}, directory_.path());
    put_file(directory_.file("first.raw"), std::string(512, 'f'));
    EXPECT_EQ(tool({"convert", "--salvage", "top.qcow2", "saved"}).status, 3);
    EXPECT_EQ(bytes_of("saved").substr(65536, 4), "AAAA");
    must_tool({"convert", "--salvage", "-l", "before", "base.qcow2", "saved"});
    EXPECT_EQ(tool({"convert", "--salvage", "-n", "base.qcow2", "there.qcow2"}).status, 3);
    EXPECT_TRUE(contents("there.qcow2") == expected);
    const auto joined = tool({"convert", "--salvage", "--json", "first.raw", "base.qcow2", "saved"});
    EXPECT_EQ(joined.status, 3);
    EXPECT_EQ(json::parse(joined.out)["lost"][0]["start"], 512);
    EXPECT_TRUE(bytes_of("saved") == std::string(512, 'f') + expected);
    EXPECT_THAT(tool({"check", "base.qcow2"}).out, HasSubstr("qcow convert --salvage"));
}

TEST_F(ConvertTest, SalvageOfWhatIsSound) {
    const auto finished = must_tool({"convert", "--salvage", "--json", "top.qcow2", "saved"});
    EXPECT_EQ(json::parse(finished.out)["lost"], json::array());
    EXPECT_TRUE(bytes_of("saved") == contents("top.qcow2"));
    EXPECT_EQ(json::parse(must_tool({"convert", "--json", "top.qcow2", "saved"}).out)["lost-bytes"], 0);
    expect_refusal({"convert", "--salvage", "top.qcow2", "-"}, HasSubstr("into a file"));
    // A backing file that is not there is no damage.
    std::filesystem::remove(directory_.file("base.qcow2"));
    expect_refusal({"convert", "--salvage", "top.qcow2", "no"}, HasSubstr("base.qcow2"));
    EXPECT_FALSE(files().contains("no"));
}

}  // namespace
}  // namespace qcow::test
