// The commands that change images: what QEMU finds in them afterwards, and what is refused without a trace.

#include <nlohmann/json.hpp>
#include <sstream>

#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

class ChangeTest : public ToolTest {
protected:
    [[nodiscard]] Finished shell(const std::string& command) const {
        return run({"sh", "-c", command}, directory_.path());
    }

    /// Runs the tool with the file `input` as its standard input.
    [[nodiscard]] Finished tool_on(const std::string& input, const std::string& arguments) const {
        return shell(std::string(QCOW_TOOL) + " " + arguments + " < " + input);
    }

    void must_tool_on(const std::string& input, const std::string& arguments) const {
        const auto finished = tool_on(input, arguments);
        ASSERT_EQ(finished.status, 0) << finished.text();
        ASSERT_EQ(finished.out + finished.err, "") << finished.text();
    }

    /// What QEMU reads from an image that its check finds sound.
    [[nodiscard]] std::string contents(const std::string& image, const std::string& format = "qcow2") const {
        if (format == "qcow2") must_qemu_img({"check", "-q", "-f", format, image}, directory_.path());
        qemu_convert_to_raw(image, format, "contents.raw", {}, directory_.path());
        return bytes_of("contents.raw");
    }

    [[nodiscard]] static std::string with(std::string old, std::size_t at, const std::string& bytes) {
        return old.replace(at, bytes.size(), bytes);
    }

    [[nodiscard]] std::uint64_t occupied(const std::string& image) const {
        return json::parse(must_tool({"info", "--json", "--usage", image}).out)["usage"]["layers"][0]["data"]["bytes"];
    }
};

TEST_F(ChangeTest, WriteWhatQemuReads) {
    const auto before = contents("top.qcow2");
    const auto base = bytes_of("base.qcow2");
    const auto data = Random(1).bytes(1'500'000);
    put_file(directory_.file("data"), data);
    for (const std::string cache : {"writeback", "writethrough", "unsafe"}) {
        must_tool_on("data", "write --cache " + cache + " top.qcow2 100001");
        EXPECT_TRUE(contents("top.qcow2") == with(before, 100'001, data)) << cache;
    }
    EXPECT_TRUE(bytes_of("base.qcow2") == base) << "the backing file was written";
    put_file(directory_.file("disk.raw"), before);
    must_tool_on("data", "write -f raw disk.raw 0.5M");
    EXPECT_TRUE(bytes_of("disk.raw") == with(before, 1 << 19, data));
}

TEST_F(ChangeTest, WriteFromAPipe) {
    const auto before = contents("top.qcow2");
    const auto copied =
        shell(std::string(QCOW_TOOL) + " read base.qcow2 0 70000 | " + QCOW_TOOL + " write top.qcow2 3M");
    EXPECT_EQ(copied.status, 0) << copied.text();
    EXPECT_TRUE(contents("top.qcow2") == with(before, 3 << 20, before.substr(0, 70'000)));
    const auto nothing = shell(std::string(QCOW_TOOL) + " write top.qcow2 4M < /dev/null");
    EXPECT_EQ(nothing.status, 0) << nothing.text();
}

TEST_F(ChangeTest, WritePastTheEndIsRefused) {
    const auto before = bytes_of("top.qcow2");
    put_file(directory_.file("data"), std::string(2 << 20, 'x'));
    const auto expect_refused = [&](const Finished& finished) {
        EXPECT_EQ(finished.status, 1) << finished.text();
        EXPECT_THAT(finished.err, AllOf(HasSubstr("top.qcow2"), HasSubstr("past the end of the disk (4194304 bytes)")));
    };
    expect_refused(tool_on("data", "write top.qcow2 2097153"));
    expect_refused(tool_on("data", "write top.qcow2 5M"));
    expect_refused(shell("head -c 1000 data | " QCOW_TOOL " write top.qcow2 4193500"));
    EXPECT_TRUE(bytes_of("top.qcow2") == before) << "written all the same";
    const auto late = shell("cat data | " QCOW_TOOL " write top.qcow2 2097153");
    expect_refused(late);
    EXPECT_THAT(late.err, HasSubstr("1048576 bytes have been written"));
}

TEST_F(ChangeTest, WriteToWhatCannotBeWritten) {
    expect_refusal({"write", "absent.qcow2", "0"}, AllOf(HasSubstr("absent.qcow2"), HasSubstr("No such file")));
    expect_refusal({"write", "base.qcow2"}, HasSubstr("OFFSET"));
    expect_refusal({"write", "base.qcow2", "x"}, HasSubstr("not a size"));
    expect_refusal({"write", "--cache", "never", "base.qcow2", "0"}, HasSubstr("never"));
    must_qemu_img({"create", "-q", "-f", "qcow", "old.qcow", "1M"}, directory_.path());
    expect_refusal({"zero", "old.qcow", "0", "1k"}, AllOf(HasSubstr("old.qcow"), HasSubstr("cannot be written")));
    const auto reader = value_of(open_file(directory_.file("base.qcow2")));
    expect_refusal({"zero", "base.qcow2", "0", "1k"}, HasSubstr("base.qcow2"));
}

TEST_F(ChangeTest, ZeroAndDiscard) {
    const auto before = contents("base.qcow2");
    const auto space = occupied("base.qcow2");
    must_tool({"zero", "--keep", "base.qcow2", "0", "70000"});
    EXPECT_TRUE(contents("base.qcow2") == with(before, 0, std::string(70'000, '\0')));
    must_tool({"zero", "base.qcow2", "0", "70001"});
    EXPECT_TRUE(contents("base.qcow2") == with(before, 0, std::string(70'001, '\0')));
    EXPECT_LT(occupied("base.qcow2"), space);
    must_tool({"discard", "base.qcow2", "0.5M", "1M"});
    EXPECT_EQ(contents("base.qcow2").substr(1 << 20, 65536), std::string(65536, '\0'));
    for (const std::string command : {"zero", "discard"}) {
        expect_refusal({command, "base.qcow2", "4M", "1"}, AllOf(HasSubstr("base.qcow2"), HasSubstr("past the end")));
        expect_refusal({command, "base.qcow2", "7E", "7E"}, HasSubstr("past the end"));
        expect_refusal({command, "base.qcow2", "0"}, HasSubstr("LENGTH"));
        must_tool({command, "base.qcow2", "4M", "0"});
    }
    EXPECT_EQ(json::parse(must_tool({"snapshot", "-l", "--json", "base.qcow2"}).out).size(), 1);
    EXPECT_EQ(must_tool({"read", "-l", "before", "base.qcow2", "0", "3"}).out, "AAA");
}

TEST_F(ChangeTest, Resize) {
    const auto before = contents("top.qcow2");
    const auto size = [&] {
        return qemu_img_json({"info", "--output=json", "top.qcow2"}, directory_.path())["virtual-size"]
            .get<std::uint64_t>();
    };
    must_tool({"resize", "top.qcow2", "6M"});
    EXPECT_EQ(size(), 6U << 20);
    must_tool({"resize", "top.qcow2", "+0.5M"});
    EXPECT_EQ(size(), 13U << 19);
    EXPECT_TRUE(contents("top.qcow2") == before + std::string(5 << 19, '\0'));
    expect_refusal({"resize", "top.qcow2", "-1M"}, AllOf(HasSubstr("top.qcow2"), HasSubstr("--shrink")));
    expect_refusal({"resize", "top.qcow2", "2M"}, HasSubstr("--shrink"));
    EXPECT_EQ(size(), 13U << 19);
    must_tool({"resize", "--shrink", "top.qcow2", "-1M"});
    EXPECT_EQ(size(), 11U << 19);
    must_tool({"resize", "--shrink", "top.qcow2", "2M"});
    EXPECT_TRUE(contents("top.qcow2") == before.substr(0, 2 << 20));
    for (const std::string bad : {"", "+", "-", "x", "+x", "--1M", "1X"}) {
        EXPECT_EQ(tool({"resize", "top.qcow2", bad}).status, 1) << bad;
    }
    expect_refusal({"resize", "--shrink", "top.qcow2", "-3M"}, HasSubstr("top.qcow2"));
    expect_refusal({"resize", "top.qcow2", "+9223372036854775807"}, HasSubstr("top.qcow2"));
    expect_refusal({"resize", "top.qcow2", "7E"}, HasSubstr("top.qcow2"));
    EXPECT_EQ(size(), 2U << 20);
    put_file(directory_.file("disk.raw"), "0123456789");
    must_tool({"resize", "-f", "raw", "disk.raw", "1k"});
    must_tool({"resize", "--shrink", "-f", "raw", "disk.raw", "-512"});
    EXPECT_EQ(bytes_of("disk.raw"), "0123456789" + std::string(502, '\0'));
}

TEST_F(ChangeTest, ConvertIntoWhatIsThere) {
    const auto source = contents("top.qcow2");
    const auto old = Random(2).bytes(5 << 20);
    put_file(directory_.file("old.raw"), old);
    const auto expected = with(old, 0, source);
    for (const std::string format : {"raw", "qcow2"}) {
        for (const Arguments& options : {Arguments{}, {"-m", "1"}, {"-S", "0"}, {"--cache", "unsafe"}}) {
            must_qemu_img({"convert", "-O", format, "old.raw", "ours"}, directory_.path());
            must_qemu_img({"convert", "-O", format, "old.raw", "theirs"}, directory_.path());
            Arguments arguments = {"convert", "-n", "-O", format, "top.qcow2", "ours"};
            arguments.insert(arguments.end(), options.begin(), options.end());
            must_tool(arguments);
            must_qemu_img({"convert", "-n", "-O", format, "top.qcow2", "theirs"}, directory_.path());
            EXPECT_TRUE(contents("ours", format) == expected) << format;
            must_qemu_img({"compare", "-f", format, "-F", format, "ours", "theirs"}, directory_.path());
        }
    }
    EXPECT_THAT(files(), testing::Contains("ours"));
}

TEST_F(ChangeTest, ConvertIntoAnOverlayThatHidesItsBackingFile) {
    const auto source = Random(3).bytes(100'000) + std::string((4 << 20) - 100'000, '\0');
    put_file(directory_.file("new.raw"), source);
    must_tool({"convert", "-n", "-f", "raw", "new.raw", "top.qcow2"});
    EXPECT_TRUE(contents("top.qcow2") == source);
    EXPECT_THAT(must_tool({"info", "top.qcow2"}).out, HasSubstr("base.qcow2"));
}

TEST_F(ChangeTest, ConvertIntoWhatIsZero) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "target.qcow2", "4M"}, directory_.path());
    must_tool({"convert", "-n", "--target-is-zero", "top.qcow2", "target.qcow2"});
    EXPECT_TRUE(contents("target.qcow2") == contents("top.qcow2"));
    // What the flag says is believed.
    must_qemu_io("target.qcow2", "qcow2", {"write -q -P 90 3M 64k"}, directory_.path());
    must_tool({"convert", "-n", "--target-is-zero", "top.qcow2", "target.qcow2"});
    EXPECT_EQ(contents("target.qcow2").substr(3 << 20, 65536), std::string(65536, 'Z'));
}

TEST_F(ChangeTest, ConvertCompressedIntoWhatIsThere) {
    for (const std::string type : {"zlib", "zstd"}) {
        // Old contents, a source that ends within a cluster, and more disk behind it.
        put_file(directory_.file("old.raw"), Random(4).bytes(5 << 20));
        must_qemu_img({"convert", "-O", "qcow2", "-o", "compression_type=" + type, "old.raw", "target.qcow2"},
                      directory_.path());
        const auto source = Random(5).bytes(1'000'000) + std::string(1'000'000, '\0') + Random(6).bytes(1'000'192);
        put_file(directory_.file("new.raw"), source);
        must_tool({"convert", "-n", "-c", "-m", "4", "-f", "raw", "new.raw", "target.qcow2"});
        const auto whole_sectors = source + std::string(512 - source.size() % 512, '\0');
        EXPECT_TRUE(contents("target.qcow2") == with(bytes_of("old.raw"), 0, whole_sectors)) << type;
        const auto usage = json::parse(must_tool({"info", "--json", "--usage", "target.qcow2"}).out)["usage"];
        EXPECT_GE(usage["layers"][0]["compressed"]["bytes"], 1'800'000) << type;
    }
    expect_refusal({"convert", "-n", "-c", "-O", "raw", "base.qcow2", "old.raw"}, HasSubstr("old.raw"));
}

TEST_F(ChangeTest, ConvertIntoWhatDoesNotDo) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "small.qcow2", "3M"}, directory_.path());
    const auto small = bytes_of("small.qcow2");
    expect_refusal({"convert", "-n", "base.qcow2", "small.qcow2"},
                   AllOf(HasSubstr("small.qcow2"), HasSubstr("3145728"), HasSubstr("4194304")));
    expect_refusal({"convert", "-n", "-o", "cluster_size=4k", "base.qcow2", "small.qcow2"}, HasSubstr("-o"));
    expect_refusal({"convert", "-n", "base.qcow2", "absent"}, AllOf(HasSubstr("absent"), HasSubstr("No such file")));
    expect_refusal({"convert", "-n", "base.qcow2", "base.qcow2"}, HasSubstr("would overwrite"));
    expect_refusal({"convert", "-n", "top.qcow2", "base.qcow2"}, HasSubstr("would overwrite"));
    expect_refusal({"convert", "--target-is-zero", "base.qcow2", "out"}, HasSubstr("--no-create"));
    EXPECT_TRUE(bytes_of("small.qcow2") == small);
}

TEST_F(ChangeTest, ConvertThatFailsLeavesTheTargetThere) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "target.qcow2", "4M"}, directory_.path());
    corrupt_l2_entry();
    expect_refusal({"convert", "-n", "base.qcow2", "target.qcow2"}, HasSubstr("L2 entry"));
    must_qemu_img({"check", "-q", "target.qcow2"}, directory_.path());
}

/// The system calls with which a file is made durable and given its name, in their order.
TEST_F(ChangeTest, NewFilesAreDurableBeforeTheyHaveTheirName) {
    const auto calls = [&](const Arguments& arguments) {
        // The leak detector of sanitizers and strace both want to trace the process.
        Arguments command = {"env", "ASAN_OPTIONS=detect_leaks=0",        "strace", "-f", "-o", "trace",
                             "-e",  "trace=fdatasync,fsync,rename,linkat"};
        command.insert(command.end(), QCOW_TOOL);
        command.insert(command.end(), arguments.begin(), arguments.end());
        must_run(command, directory_.path());
        std::vector<std::string> result;
        std::istringstream trace(bytes_of("trace"));
        for (std::string line; std::getline(trace, line);) {
            for (const auto* call : {"fdatasync(", "fsync(", "rename(", "linkat("}) {
                if (line.find(call) != std::string::npos) result.emplace_back(call);
            }
        }
        return result;
    };
    // The contents, the name, and the directory that has it.
    const auto in_order = testing::ElementsAre("fdatasync(", "linkat(", "fsync(");
    EXPECT_THAT(calls({"convert", "-O", "qcow2", "top.qcow2", "new.qcow2"}), in_order);
    EXPECT_THAT(calls({"convert", "top.qcow2", "new.raw"}), in_order);
    EXPECT_THAT(calls({"create", "-q", "made.qcow2", "1G"}), in_order);
    EXPECT_THAT(calls({"convert", "top.qcow2", "new.raw"}),
                testing::ElementsAre("fdatasync(", "linkat(", "rename(", "fsync("));
    EXPECT_THAT(calls({"create", "-q", "-o", "data_file=data", "with-data.qcow2", "1G"}),
                testing::ElementsAre("fdatasync(", "fdatasync(", "fdatasync(", "linkat(", "fsync(", "fdatasync(",
                                     "linkat(", "fsync("));
    EXPECT_THAT(calls({"convert", "--cache", "unsafe", "top.qcow2", "new.raw"}),
                testing::ElementsAre("linkat(", "rename("));
}

TEST_F(ChangeTest, PastTheCache) {
    const TemporaryDirectory disk(on_a_disk);
    const auto on_disk = [&](const std::string& command) {
        const auto finished = run({"sh", "-c", command}, disk.path());
        EXPECT_EQ(finished.status, 0) << finished.text();
    };
    const auto before = contents("top.qcow2");
    const auto data = Random(7).bytes(1'500'000);
    put_file(disk.file("data"), data);
    for (const std::string name : {"base.qcow2", "top.qcow2"})
        std::filesystem::copy(directory_.file(name), disk.file(name));
    const auto direct = open_file(disk.file("data"), {.direct = true});
    if (!direct && direct.error().code == Errc::unsupported) GTEST_SKIP() << direct.error().message();

    const std::string tool = QCOW_TOOL;
    on_disk(tool + " write --cache none top.qcow2 100001 < data");
    on_disk(tool + " zero --cache none top.qcow2 200001 100000");
    on_disk(tool + " resize --cache none top.qcow2 +1k");
    on_disk("qemu-img check -q top.qcow2 && qemu-img convert -O raw top.qcow2 top.raw");
    const auto expected =
        with(with(before, 100'001, data), 200'001, std::string(100'000, '\0')) + std::string(1024, '\0');
    EXPECT_TRUE(file_bytes(disk.file("top.raw")) == expected);
    on_disk("head -c 4195329 /dev/zero > new.raw");
    on_disk(tool + " convert -n -O raw --cache none top.qcow2 new.raw && qemu-img compare top.qcow2 new.raw");
    EXPECT_EQ(std::filesystem::file_size(disk.file("new.raw")), 4'195'329);
}

}  // namespace
}  // namespace qcow::test
