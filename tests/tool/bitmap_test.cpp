// qcow bitmap and qcow convert --bitmaps beside qemu-img's.

#include <nlohmann/json.hpp>

#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::HasSubstr;

class BitmapTool : public ToolTest {
protected:
    [[nodiscard]] json bitmaps(const std::string& image) const {
        const auto info = qemu_img_json({"info", "--output=json", image}, directory_.path());
        return info["format-specific"]["data"].value("bitmaps", json::array());
    }

    [[nodiscard]] json dirty(const std::string& image, const std::string& bitmap) const {
        return json::parse(must_run({"nbdinfo", "--json", "--map=qemu:dirty-bitmap:" + bitmap, "--", "[", "qemu-nbd",
                                     "-r", "-f", "qcow2", "-B", bitmap, image, "]"},
                                    directory_.path())
                               .out);
    }

    void make(const std::string& name, const std::string& size = "8M") const {
        must_qemu_img({"create", "-q", "-f", "qcow2", name, size}, directory_.path());
    }

    void write(const std::string& image, const std::string& where) const {
        must_qemu_io(image, "qcow2", {"write -q " + where}, directory_.path());
    }
};

TEST_F(BitmapTool, ActionsInTheOrderOfTheCommandLine) {
    for (const std::string image : {"ours", "theirs"}) {
        const auto change = [&](Arguments arguments) {
            arguments.insert(arguments.begin(), "bitmap");
            if (image == "ours") {
                EXPECT_EQ(must_tool(arguments).out, "");
            } else {
                must_qemu_img(arguments, directory_.path());
            }
        };
        make(image);
        change({"--add", "-g", "4k", image, "monday"});
        write(image, "1M 64k");
        change({"--add", "--disable", image, "copy"});
        write(image, "3M 64k");
        change({"--merge", "monday", image, "copy"});
        change({"--clear", "--disable", "--enable", image, "monday"});
        write(image, "5M 512");
        change({"--add", image, "brief"});
        change({"--remove", image, "brief"});
    }
    EXPECT_EQ(bitmaps("ours"), bitmaps("theirs"));
    EXPECT_EQ(bitmaps("ours").size(), 2U);
    for (const auto* name : {"monday", "copy"}) EXPECT_EQ(dirty("ours", name), dirty("theirs", name));
    must_qemu_img({"check", "ours"}, directory_.path());
    // From another file, and back to an image without bitmaps.
    make("new");
    must_tool({"bitmap", "--add", "--merge", "monday", "--merge", "copy", "-b", "theirs", "-F", "qcow2", "new", "all"});
    EXPECT_EQ(dirty("new", "all")[1]["offset"], 1 << 20);
    must_tool({"bitmap", "--remove", "new", "all"});
    EXPECT_EQ(bitmaps("new"), json::array());
    must_qemu_img({"check", "new"}, directory_.path());
}

TEST_F(BitmapTool, Refusals) {
    make("image");
    expect_refusal({"bitmap", "image", "a"}, HasSubstr("--add, --remove"));
    expect_refusal({"bitmap", "--add", "image"}, HasSubstr("BITMAP"));
    expect_refusal({"bitmap", "--add", "image", ""}, HasSubstr("empty"));
    expect_refusal({"bitmap", "--clear", "image", "a"}, HasSubstr("there is none of this name"));
    expect_refusal({"bitmap", "--clear", "-g", "4k", "image", "a"}, HasSubstr("only with --add"));
    expect_refusal({"bitmap", "--clear", "-b", "image", "image", "a"}, HasSubstr("only with --merge"));
    expect_refusal({"bitmap", "--add", "-F", "qcow2", "image", "a"}, HasSubstr("only with --source-file"));
    expect_refusal({"bitmap", "--add", "-g", "5k", "image", "a"}, HasSubstr("power of two"));
    expect_refusal({"bitmap", "--add", "--remove", "--clear", "image", "a"}, HasSubstr("there is none of this name"));
    EXPECT_EQ(bitmaps("image"), json::array());
    write_file(directory_.file("raw"), std::string(1024, 'x'));
    expect_refusal({"bitmap", "--add", "-f", "raw", "raw", "a"}, HasSubstr("raw: a raw image has no bitmaps"));
}

TEST_F(BitmapTool, ConvertCopiesBitmaps) {
    make("from");
    must_qemu_img({"bitmap", "--add", "-g", "4k", "from", "a"}, directory_.path());
    write("from", "1M 64k");
    must_qemu_img({"bitmap", "--add", "--disable", "from", "b"}, directory_.path());
    must_qemu_img({"bitmap", "--merge", "a", "from", "b"}, directory_.path());
    must_qemu_img({"create", "-q", "-f", "qcow2", "base", "8M"}, directory_.path());
    make("there");
    for (const auto& arguments : std::vector<Arguments>{{"-O", "qcow2", "from", "to"},
                                                        {"-O", "qcow2", "-c", "from", "to"},
                                                        {"-O", "qcow2", "-B", "base", "-F", "qcow2", "from", "to"},
                                                        {"-O", "qcow2", "-o", "data_file=data", "from", "to"},
                                                        {"-n", "-O", "qcow2", "from", "there"}}) {
        Arguments all = {"convert", "--bitmaps"};
        all.insert(all.end(), arguments.begin(), arguments.end());
        must_tool(all);
        const auto& target = arguments.back();
        must_qemu_img({"compare", "from", target}, directory_.path());
        must_qemu_img({"check", target}, directory_.path());
        EXPECT_EQ(bitmaps(target), bitmaps("from"));
        for (const auto* name : {"a", "b"}) EXPECT_EQ(dirty(target, name), dirty("from", name));
    }
    expect_refusal({"convert", "--bitmaps", "from", "raw"}, HasSubstr("--bitmaps"));
    expect_refusal({"convert", "--bitmaps", "-O", "qcow2", "-o", "compat=0.10", "from", "x"}, HasSubstr("version 3"));
    expect_refusal({"convert", "--bitmaps", "-O", "qcow2", "from", "from", "x"}, HasSubstr("several sources"));
    expect_refusal({"convert", "--skip-broken-bitmaps", "-O", "qcow2", "from", "x"}, HasSubstr("--bitmaps"));
    expect_refusal({"convert", "--bitmaps", "-n", "from", "there"}, HasSubstr("already"));
    must_tool({"snapshot", "-c", "s", "from"});
    expect_refusal({"convert", "--bitmaps", "-l", "s", "-O", "qcow2", "from", "x"}, HasSubstr("active state"));
    EXPECT_FALSE(std::filesystem::exists(directory_.file("x")));
}

/// Those that are enabled record what the conversion writes; the others stay.
TEST_F(BitmapTool, ConvertIntoAnImageWithBitmaps) {
    make("from");
    write("from", "2M 1M");
    for (const std::string target : {"ours", "theirs"}) {
        make(target);
        write(target, "7M 64k");
        must_qemu_img({"bitmap", "--add", target, "on"}, directory_.path());
        must_qemu_img({"bitmap", "--add", "--disable", target, "off"}, directory_.path());
    }
    must_qemu_img({"convert", "-n", "-O", "qcow2", "from", "theirs"}, directory_.path());
    must_tool({"convert", "-n", "-O", "qcow2", "from", "ours"});
    EXPECT_EQ(bitmaps("ours"), bitmaps("theirs"));
    for (const auto* name : {"on", "off"}) EXPECT_EQ(dirty("ours", name), dirty("theirs", name)) << name;
}

/// What cannot have them keeps its contents.
TEST_F(BitmapTool, ATargetThatCannotTakeThemIsLeftAlone) {
    make("from");
    must_qemu_img({"bitmap", "--add", "from", "b"}, directory_.path());
    write("from", "0 1M");
    make("has-it");
    must_qemu_img({"bitmap", "--add", "has-it", "b"}, directory_.path());
    make("larger", "16M");
    must_qemu_img({"create", "-q", "-f", "qcow2", "-o", "compat=0.10", "version-2", "8M"}, directory_.path());
    must_qemu_img({"create", "-q", "-f", "raw", "raw", "8M"}, directory_.path());
    for (const auto& [target, why] : {std::pair("has-it", "has a bitmap \"b\" already"),
                                      {"larger", "of a disk of 8388608 bytes, and this one has 16777216"},
                                      {"version-2", "version 3"},
                                      {"raw", "version 3"}}) {
        const auto before = bytes_of(target);
        const auto* format = std::string(target) == "raw" ? "raw" : "qcow2";
        expect_refusal({"convert", "--bitmaps", "-n", "-O", format, "from", target}, HasSubstr(why));
        EXPECT_TRUE(bytes_of(target) == before) << target;
    }
}

TEST_F(BitmapTool, ConvertLeavesBrokenBitmapsOut) {
    make("from");
    must_qemu_img({"bitmap", "--add", "from", "good"}, directory_.path());
    must_qemu_img({"bitmap", "--add", "from", "broken"}, directory_.path());
    // The flag in_use of the second entry of the directory.
    auto bytes = bytes_of("from");
    const auto at = bytes.find("broken");
    ASSERT_NE(at, std::string::npos);
    bytes[at - 24 + 15] |= 1;
    write_file(directory_.file("from"), bytes);
    expect_refusal({"convert", "--bitmaps", "-O", "qcow2", "from", "to"},
                   testing::AllOf(HasSubstr("\"broken\""), HasSubstr("--skip-broken-bitmaps")));
    const auto converted = tool({"convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "from", "to"});
    EXPECT_EQ(converted.status, 0);
    EXPECT_THAT(converted.err,
                testing::AllOf(HasSubstr("warning"), HasSubstr("\"broken\""), HasSubstr("does not have it")));
    EXPECT_EQ(bitmaps("to").size(), 1U);
    must_tool({"bitmap", "--remove", "from", "broken"});
    must_tool({"convert", "--bitmaps", "-O", "qcow2", "from", "to"});
}

/// qcow measure says how long the file will be.
TEST_F(BitmapTool, CopiesTakeWhatWasMeasured) {
    for (const auto* options : {"cluster_size=64k", "cluster_size=4k", "cluster_size=512"}) {
        std::filesystem::remove(directory_.file("disk.qcow2"));
        must_qemu_img({"create", "-q", "-f", "qcow2", "-o", options, "disk.qcow2", "4M"}, directory_.path());
        for (const auto* name : {"first", "second"})
            must_qemu_img({"bitmap", "--add", "disk.qcow2", name}, directory_.path());
        write("disk.qcow2", "0 4M");
        const auto need = json::parse(must_tool({"measure", "--json", "-O", "qcow2", "-o", options, "disk.qcow2"}).out);
        must_tool({"convert", "--bitmaps", "-O", "qcow2", "-o", options, "disk.qcow2", "new.qcow2"});
        EXPECT_EQ(bytes_of("new.qcow2").size(),
                  need["required"].get<std::uint64_t>() + need["bitmaps"].get<std::uint64_t>())
            << options;
        must_qemu_img({"check", "-q", "new.qcow2"}, directory_.path());
        EXPECT_EQ(dirty("new.qcow2", "second"), dirty("disk.qcow2", "second"));
    }
}

TEST_F(BitmapTool, ADiskOfNoBytesHasNone) {
    make("disk.qcow2");
    must_qemu_img({"bitmap", "--add", "disk.qcow2", "b"}, directory_.path());
    expect_refusal({"resize", "--shrink", "disk.qcow2", "0"}, HasSubstr("remove them first"));
    EXPECT_EQ(bitmaps("disk.qcow2").size(), 1U);
    must_tool({"bitmap", "--remove", "disk.qcow2", "b"});
    must_tool({"resize", "--shrink", "disk.qcow2", "0"});
}

/// A command that is stopped closes the image. Otherwise nobody could believe the bitmaps that it writes.
TEST_F(BitmapTool, SignalsLeaveThemValid) {
    for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
        make("disk.qcow2");
        must_qemu_img({"bitmap", "--add", "disk.qcow2", "b"}, directory_.path());
        Subprocess writing({QCOW_TOOL, "write", "disk.qcow2", "0"}, directory_.path());
        writing.write(std::string(2 << 20, 'x'));
        // The first MiB is written before the rest is read.
        while (bytes_of("disk.qcow2").size() < 1 << 20) std::this_thread::sleep_for(std::chrono::milliseconds(5));
        writing.signal(signal);
        writing.wait_for("closed in order");  // its input ends after that
        EXPECT_EQ(writing.finish().status, 128 + signal);
        EXPECT_EQ(bitmaps("disk.qcow2")[0]["flags"], json::array({"auto"}));
        must_qemu_img({"check", "-q", "disk.qcow2"}, directory_.path());
        EXPECT_EQ(dirty("disk.qcow2", "b")[0]["type"], 1);
    }
}

}  // namespace
}  // namespace qcow::test
