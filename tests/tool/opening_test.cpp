// What a command makes of the name that it is given, of the file behind it, and of the files that this one names.

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/endian.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using namespace std::string_literals;

class Opening : public ToolTest {
protected:
    /// A whole line for a shell, in which "qcow" is the tool.
    [[nodiscard]] Finished shell(const std::string& line) const {
        return run({"sh", "-c", "qcow() { " QCOW_TOOL " \"$@\"; }; " + line}, directory_.path());
    }

    [[nodiscard]] std::string read(Arguments arguments) const {
        arguments.insert(arguments.begin(), "read");
        const auto finished = tool(arguments);
        EXPECT_EQ(finished.status, 0) << finished.text();
        return finished.out;
    }

    void put(const std::string& name, const std::string& bytes) const { put_file(directory_.file(name), bytes); }

    /// The image with a number of its header changed.
    template <class T>
    void poke(const std::string& name, std::size_t at, T value) const {
        auto bytes = bytes_of(name);
        store_be(std::as_writable_bytes(std::span(bytes)), at, value);
        put(name, bytes);
    }

    /// An overlay that records this name, and perhaps this format.
    void make_overlay(const std::string& name, const std::string& backing, const std::string& format = "qcow2") const {
        must_qemu_img({"create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, name, "4M"},
                      directory_.path());
    }

    /// Both programs see the same disk.
    void expect_equal_to_qemu(const std::string& image) const {
        must_tool({"convert", image, "ours.raw"});
        qemu_convert_to_raw(image, "qcow2", "theirs.raw", {}, directory_.path());
        EXPECT_EQ(
            first_difference(ReferenceFile(directory_.file("ours.raw")), ReferenceFile(directory_.file("theirs.raw"))),
            std::nullopt)
            << image;
    }
};

// Names.

TEST_F(Opening, EveryCommandTakesFileAndJsonNames) {
    const auto described = [](const std::string& name) {
        return "json:{'driver':'qcow2','file':{'driver':'file','filename':'" + name + "'}}";
    };
    const std::string base = bytes_of("base.qcow2");
    for (const bool as_json : {false, true}) {
        const auto named = [&](const std::string& name) { return as_json ? described(name) : "file:" + name; };
        const auto image = named("base.qcow2");
        EXPECT_THAT(must_tool({"info", image}).out, HasSubstr("image:            base.qcow2\n"));
        EXPECT_THAT(must_tool({"check", image}).out, HasSubstr("clean"));
        EXPECT_EQ(must_tool({"map", image}).out, must_tool({"map", "base.qcow2"}).out);
        EXPECT_EQ(read({image, "0", "1"}), "C");
        EXPECT_THAT(must_tool({"snapshot", "--list", image}).out, HasSubstr("before"));
        must_tool({"convert", image, "file:out.raw"});
        EXPECT_EQ(bytes_of("out.raw").substr(0, 1), "C");
        must_tool({"convert", "-O", "qcow2", image, named("out.qcow2")});
        must_tool({"convert", "-n", "-O", "qcow2", image, named("out.qcow2")});
        must_tool({"zero", named("out.qcow2"), "0", "64k"});
        must_tool({"discard", named("out.qcow2"), "0", "64k"});
        must_tool({"resize", named("out.qcow2"), "8M"});
        EXPECT_EQ(shell("printf x | qcow write \"" + named("out.qcow2") + "\" 0").status, 0);
        EXPECT_EQ(read({"out.qcow2", "0", "2"}), "x\0"s);
        must_tool({"create", "-q", named("new.qcow2"), "1M"});
        must_tool({"create", "-q", "-b", image, "-F", "qcow2", "over.qcow2"});
        EXPECT_EQ(read({"over.qcow2", "0", "1"}), "C");
        must_tool({"convert", "-O", "qcow2", "-B", image, "-F", "qcow2", image, "over2.qcow2"});
        EXPECT_EQ(read({"over2.qcow2", "0", "1"}), "C");
        EXPECT_EQ(read({"--backing", image, "--backing-format", "qcow2", "top.qcow2", "0", "1"}), "C");
        for (const Arguments& options : {Arguments{"--read-only"}, Arguments{}}) {
            Arguments command = {QCOW_TOOL, "serve", "--persistent", "--port", "0", named("out.qcow2")};
            command.insert(command.end(), options.begin(), options.end());
            Subprocess server(command, directory_.path());
            server.wait_for("listening on");
            server.signal(SIGTERM);
            EXPECT_EQ(server.finish().status, 0);
        }
        // QEMU finds what an image records of it, wherever it is started.
        EXPECT_EQ(qemu_img_json({"info", "--output=json", "over.qcow2"}, directory_.path())["backing-filename"],
                  as_json ? image : "base.qcow2");
        must_qemu_io("over.qcow2", "qcow2", {"read -P 67 0 64k"}, directory_.path());
    }
    EXPECT_EQ(bytes_of("base.qcow2"), base);
    EXPECT_FALSE(files().contains("file:out.raw"));
}

TEST_F(Opening, TheFormatOfAJsonName) {
    put("disk", bytes_of("base.qcow2"));
    EXPECT_EQ(read({"json:{'driver':'raw','file.filename':'disk'}", "0", "3"}), "QFI");
    EXPECT_EQ(read({"-f", "qcow2", "json:{'driver':'raw','file.filename':'disk'}", "0", "1"}), "C");
    const auto alone = tool({"read", "json:{'driver':'qcow2','backing':null,'file.filename':'top.qcow2'}", "0", "1"});
    EXPECT_EQ(alone.out, "\0"s);
    EXPECT_THAT(alone.err, HasSubstr("READS AS ZEROS"));
    expect_refusal({"info", "json:{'driver':'vmdk','file.filename':'disk'}"}, HasSubstr("vmdk"));
    expect_refusal({"info", "json:{"}, HasSubstr("not a JSON object"));
    expect_refusal({"info", "nbd://host/export"}, HasSubstr("scheme \"nbd:\""));
}

/// QEMU takes what comes before the colon for the name of a protocol, and so do we where an image records it.
TEST_F(Opening, NamesWithColonsAreRecordedSoThatTheyAreFound) {
    std::filesystem::copy_file(directory_.file("base.qcow2"), directory_.file("vm:disk.qcow2"));
    EXPECT_EQ(read({"vm:disk.qcow2", "0", "1"}), "C");
    must_tool({"create", "-q", "-b", "vm:disk.qcow2", "-F", "qcow2", "1.qcow2"});
    must_tool({"create", "-q", "-o", "backing_file=vm:disk.qcow2,backing_fmt=qcow2", "2.qcow2"});
    must_tool({"create", "-q", "-u", "-b", "vm:disk.qcow2", "-F", "qcow2", "3.qcow2", "4M"});
    must_tool({"convert", "-O", "qcow2", "-B", "vm:disk.qcow2", "-F", "qcow2", "vm:disk.qcow2", "vm:4.qcow2"});
    for (const std::string image : {"1.qcow2", "2.qcow2", "3.qcow2", "vm:4.qcow2"}) {
        EXPECT_EQ(read({image, "0", "1"}), "C") << image;
        must_qemu_io("./" + image, "qcow2", {"read -P 67 0 64k"}, directory_.path());
    }
    for (const std::string name : {"vm:data.raw", "file:vm:data.raw"}) {
        must_tool({"create", "-q", "-o", "data_file=" + name, "data.qcow2", "1M"});
        EXPECT_EQ(shell("printf x | qcow write data.qcow2 0").status, 0);
        EXPECT_EQ(read({"data.qcow2", "0", "1"}), "x");
        EXPECT_EQ(bytes_of("vm:data.raw").substr(0, 1), "x");
        must_qemu_io("data.qcow2", "qcow2", {"read -P 120 0 1"}, directory_.path());
        std::filesystem::remove(directory_.file("vm:data.raw"));
    }
    std::filesystem::remove(directory_.file("1.qcow2"));
    expect_refusal({"create", "-b", "nbd://host/x", "-F", "raw", "1.qcow2"}, HasSubstr("scheme \"nbd:\""));
    EXPECT_FALSE(files().contains("1.qcow2"));
}

TEST_F(Opening, PathsOfWindows) {
    for (const std::string name :
         {R"(C:\VMs\base.qcow2)", "C:/VMs/base.qcow2", R"(images\base.qcow2)", R"(\\server\share\base.qcow2)"}) {
        make_overlay("windows.qcow2", name);
        expect_refusal({"read", "windows.qcow2", "0", "1"},
                       AllOf(HasSubstr(name), HasSubstr("path of Windows"), HasSubstr("--backing FILE")));
        EXPECT_EQ(read({"--backing", "base.qcow2", "windows.qcow2", "0", "1"}), "C");
    }
}

// Another backing file, or none.

TEST_F(Opening, AnotherBackingFile) {
    std::filesystem::create_directory(directory_.file("elsewhere"));
    std::filesystem::rename(directory_.file("base.qcow2"), directory_.file("elsewhere/moved.qcow2"));
    const auto hint = AllOf(HasSubstr("base.qcow2"), HasSubstr("--backing FILE"), HasSubstr("--no-backing"));
    expect_refusal({"read", "top.qcow2", "0", "1"}, hint);
    const std::string moved = "elsewhere/moved.qcow2";
    EXPECT_EQ(read({"--backing", moved, "top.qcow2", "0", "1"}), "C");
    EXPECT_EQ(read({"--backing", moved, "top.qcow2", "2M", "1"}), "D");
    must_tool({"convert", "--backing", moved, "top.qcow2", "out.raw"});
    EXPECT_EQ(bytes_of("out.raw").substr(1 << 20, 1), "B");
    must_tool({"convert", "-O", "qcow2", "--backing", moved, "-B", moved, "-F", "qcow2", "top.qcow2", "new.qcow2"});
    EXPECT_EQ(read({"new.qcow2", "0", "1"}), "C");
    EXPECT_EQ(json::parse(must_tool({"map", "--json", "--backing", moved, "top.qcow2"}).out)[0]["depth"], 1);
    EXPECT_THAT(must_tool({"check", "--backing", moved, "top.qcow2"}).out, HasSubstr("clean"));
    EXPECT_THAT(must_tool({"info", "--backing-chain", "--backing", moved, "top.qcow2"}).out, HasSubstr(moved));
    expect_refusal({"read", "--backing", "missing", "top.qcow2", "0", "1"}, HasSubstr("missing"));
    expect_refusal({"read", "--backing", "top.qcow2", "top.qcow2", "0", "1"}, HasSubstr("loop"));
    put("disk.raw", std::string(512, 'r'));
    expect_refusal({"read", "--backing", moved, "disk.raw", "0", "1"}, HasSubstr("raw disk has no backing file"));
    // An image that names none.
    const auto below = tool({"read", "--backing", "disk.raw", moved, "3M", "1"});
    EXPECT_EQ(below.out, "\0"s);
    EXPECT_THAT(below.err, HasSubstr("names no backing file"));
}

/// What is said counts first, then what the image records, then what the file looks like.
TEST_F(Opening, TheFormatOfAnotherBackingFile) {
    make_overlay("raw.qcow2", "base.qcow2", "raw");
    EXPECT_EQ(read({"raw.qcow2", "0", "3"}), "QFI");
    EXPECT_EQ(read({"--backing", "base.qcow2", "raw.qcow2", "0", "3"}), "QFI");
    EXPECT_EQ(read({"--backing", "base.qcow2", "--backing-format", "qcow2", "raw.qcow2", "0", "3"}), "CCC");
    EXPECT_EQ(read({"--backing-format", "qcow2", "raw.qcow2", "0", "3"}), "CCC");
    put("disk.raw", std::string(4 << 20, 'r'));
    expect_refusal({"read", "--backing", "disk.raw", "top.qcow2", "0", "1"}, HasSubstr("not a qcow2 image"));
    EXPECT_EQ(read({"--backing", "disk.raw", "--backing-format", "raw", "top.qcow2", "0", "1"}), "r");
}

TEST_F(Opening, NoBackingFile) {
    std::filesystem::remove(directory_.file("base.qcow2"));
    const auto expect_loud = [&](const Arguments& arguments) {
        const auto finished = tool(arguments);
        EXPECT_EQ(finished.status, 0) << finished.text();
        EXPECT_THAT(finished.err,
                    AllOf(HasSubstr("warning: top.qcow2"), HasSubstr("base.qcow2"), HasSubstr("READS AS ZEROS")))
            << finished.text();
        return finished.out;
    };
    EXPECT_EQ(expect_loud({"read", "--no-backing", "top.qcow2", "0", "1"}), "\0"s);
    EXPECT_EQ(expect_loud({"read", "--no-backing", "top.qcow2", "2M", "1"}), "D");
    expect_loud({"convert", "--no-backing", "top.qcow2", "out.raw"});
    EXPECT_EQ(bytes_of("out.raw").substr(0, 1), "\0"s);
    EXPECT_THAT(expect_loud({"map", "--no-backing", "top.qcow2"}), HasSubstr("unallocated"));
    EXPECT_THAT(expect_loud({"check", "--no-backing", "top.qcow2"}), HasSubstr("clean"));
    EXPECT_THAT(expect_loud({"info", "--no-backing", "top.qcow2"}), HasSubstr("base.qcow2"));
    EXPECT_THAT(expect_loud({"info", "--backing-chain", "--no-backing", "top.qcow2"}), HasSubstr("base.qcow2"));
    const auto both = tool({"read", "--no-backing", "--backing", "x", "top.qcow2", "0", "1"});
    EXPECT_EQ(both.status, 1);
    // Zeros would be written in the place of the backing file's data.
    expect_refusal({"serve", "--no-backing", "--socket", "s", "top.qcow2"}, HasSubstr("only read"));
    // The data file is no backing file.
    must_tool({"create", "-q", "-o", "data_file=data.raw", "data.qcow2", "1M"});
    EXPECT_EQ(read({"--no-backing", "data.qcow2", "0", "1"}), "\0"s);
}

TEST_F(Opening, TheRemedyForALayerWithoutARecordedFormatWorks) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "over it.qcow2"},
                  directory_.path());
    // Without the header extension that records it: a type that nobody knows.
    auto bytes = bytes_of("over it.qcow2");
    const auto at = bytes.find("\xe2\x79\x2a\xca");
    ASSERT_NE(at, std::string::npos);
    put("over it.qcow2", bytes.replace(at, 4, "abcd"));
    const auto refused = tool({"read", "over it.qcow2", "0", "1"});
    EXPECT_EQ(refused.status, 1);
    const auto command = refused.err.find("qcow convert");
    ASSERT_NE(command, std::string::npos) << refused.err;
    const auto cured = shell(refused.err.substr(command));
    ASSERT_EQ(cured.status, 0) << cured.text();
    EXPECT_EQ(read({"over it.qcow2.new", "0", "1"}), "C");
    must_qemu_img({"compare", "over it.qcow2.new", "top.qcow2"}, directory_.path());
    EXPECT_EQ(read({"--backing-format", "qcow2", "over it.qcow2", "0", "1"}), "C");
}

// Files that are something else.

TEST_F(Opening, ImagesOfOtherFormatsAreNoRawDisks) {
    struct Kind {
        std::string format;
        std::string options;
        std::string name;
    };
    const std::vector<Kind> kinds = {{"vmdk", "subformat=monolithicSparse", "VMDK"},
                                     {"vmdk", "subformat=streamOptimized", "VMDK"},
                                     {"vmdk", "subformat=twoGbMaxExtentFlat", "VMDK"},
                                     {"vpc", "subformat=dynamic", "VHD"},
                                     {"vpc", "subformat=fixed", "VHD"},
                                     {"vhdx", "subformat=dynamic", "VHDX"},
                                     {"vdi", "static=off", "VDI"},
                                     {"qed", "cluster_size=64k", "QED"},
                                     {"parallels", "cluster_size=1M", "Parallels"}};
    for (const auto& [format, options, name] : kinds) {
        SCOPED_TRACE(format + " " + options);
        must_qemu_img({"create", "-q", "-f", format, "-o", options, "it", "4M"}, directory_.path());
        const auto is_named = HasSubstr(name);
        expect_refusal({"info", "it"}, is_named);
        expect_refusal({"convert", "-O", "qcow2", "it", "out.qcow2"}, AllOf(is_named, HasSubstr("-f raw")));
        EXPECT_FALSE(files().contains("out.qcow2"));
        must_tool({"convert", "-f", "raw", "it", "out.raw"});
        EXPECT_EQ(bytes_of("out.raw").substr(0, bytes_of("it").size()), bytes_of("it"));
    }
}

TEST_F(Opening, NoCommandTakesThemForRawDisks) {
    must_qemu_img({"create", "-q", "-f", "vmdk", "it", "4M"}, directory_.path());
    const auto before = bytes_of("it");
    put("in", "x");
    make_overlay("over.qcow2", "it", "vmdk");
    make_overlay("untold.qcow2", "it", "raw");
    auto bytes = bytes_of("untold.qcow2");
    put("untold.qcow2", bytes.replace(bytes.find("\xe2\x79\x2a\xca"), 4, "abcd"));
    for (const std::string command :
         {"info it", "map it", "check it", "read it 0 1", "convert it out", "convert -n in it", "write it 0 < in",
          "zero it 0 4k", "discard it 0 4k", "resize it 8M", "serve --socket s it", "serve -r --socket s it",
          "read over.qcow2 0 1", "read untold.qcow2 0 1", "info --backing-chain untold.qcow2",
          "read --backing it --backing-format qcow2 top.qcow2 0 1", "snapshot -l it"}) {
        const auto finished = shell("qcow " + command);
        EXPECT_EQ(finished.status, 1) << finished.text();
        EXPECT_THAT(finished.err, testing::AnyOf(HasSubstr("VMDK"), HasSubstr("vmdk"))) << finished.text();
    }
    EXPECT_EQ(bytes_of("it"), before);
    EXPECT_FALSE(files().contains("out"));
    EXPECT_EQ(read({"-f", "raw", "it", "0", "4"}), "KDMV");
    EXPECT_EQ(read({"--backing-format", "raw", "untold.qcow2", "0", "4"}), "KDMV");
}

TEST_F(Opening, WhatDownloadsLeave) {
    put("page.qcow2", "<!DOCTYPE html><html><title>404</title>");
    expect_refusal({"convert", "page.qcow2", "out.raw"}, AllOf(HasSubstr("web page"), HasSubstr("download")));
    put("pointer.img", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n");
    expect_refusal({"convert", "pointer.img", "out.raw"}, HasSubstr("git lfs pull"));
    for (const auto& [program, name] :
         {std::pair{"gzip", "gzip"}, {"xz", "xz"}, {"bzip2", "bzip2"}, {"zstd", "zstd"}}) {
        if (shell(program + " -c base.qcow2 > packed.qcow2.x"s).status != 0) continue;  // not on this system
        const auto refused = tool({"info", "packed.qcow2.x"});
        EXPECT_EQ(refused.status, 1);
        EXPECT_THAT(refused.err, HasSubstr(name));
        const auto begin = refused.err.find("unpack it with ") + 15;
        const auto command = refused.err.substr(begin, refused.err.find("; -f raw") - begin);
        EXPECT_EQ(shell(command).status, 0) << command;
        EXPECT_EQ(bytes_of("packed.qcow2.x.unpacked"), bytes_of("base.qcow2")) << command;
    }
}

TEST_F(Opening, NamesThatPromiseQcow2) {
    put("junk.qcow2", "404: Not Found");
    expect_refusal({"info", "junk.qcow2"}, AllOf(HasSubstr("no qcow2 header"), HasSubstr("-f raw")));
    must_tool({"info", "-f", "raw", "junk.qcow2"});
    // These may well be raw disks, whatever they are called.
    put("empty.qcow2", "");
    put("zeros.qcow2", std::string(1 << 20, '\0'));
    put("boots.qcow2", std::string(510, 'x') + "\x55\xaa");
    for (const std::string name : {"empty.qcow2", "zeros.qcow2", "boots.qcow2"}) {
        const auto finished = tool({"convert", name, "out.raw"});
        EXPECT_EQ(finished.status, 0) << finished.text();
        EXPECT_THAT(finished.err, HasSubstr("no qcow2 header")) << finished.text();
    }
    put("disk.img", "404: Not Found");
    must_tool({"info", "disk.img"});
}

// Damage that reading does not meet.

TEST_F(Opening, ReadingNeedsNoRefcounts) {
    const auto sound = bytes_of("base.qcow2");
    for (const std::uint64_t table :
         {std::uint64_t{0}, std::uint64_t{0x10008}, std::uint64_t{1} << 40, ~std::uint64_t{0}}) {
        put("base.qcow2", sound);
        poke("base.qcow2", 48, table);
        if (table % 65536 == 0) expect_equal_to_qemu("base.qcow2");
        EXPECT_EQ(read({"base.qcow2", "0", "1"}), "C");
        must_tool({"map", "base.qcow2"});
        must_tool({"info", "base.qcow2"});
        const auto checked = tool({"check", "base.qcow2"});
        EXPECT_EQ(checked.status, 2) << checked.text();
        EXPECT_THAT(checked.out, HasSubstr("refcount_table_offset (byte 48)"));
        expect_refusal({"zero", "base.qcow2", "0", "4k"}, HasSubstr("refcount_table_offset (byte 48)"));
    }
    put("base.qcow2", sound);
    poke("base.qcow2", 56, std::uint32_t{0});
    EXPECT_EQ(read({"base.qcow2", "0", "1"}), "C");
    EXPECT_THAT(tool({"check", "base.qcow2"}).out, HasSubstr("refcount_table_clusters (byte 56)"));
    expect_refusal({"zero", "base.qcow2", "0", "4k"}, HasSubstr("refcount_table_clusters (byte 56)"));
}

TEST_F(Opening, ASnapshotTableThatIsDamaged) {
    const auto sound = bytes_of("base.qcow2");
    const auto table = load_be<std::uint64_t>(std::as_bytes(std::span(sound)), 64);
    auto garbage = sound;
    garbage.replace(table, 400, std::string(400, 'g'));
    auto elsewhere = sound;
    store_be(std::as_writable_bytes(std::span(elsewhere)), 64, std::uint64_t{1} << 40);
    for (const auto& damaged : {garbage, elsewhere}) {
        put("base.qcow2", damaged);
        const auto info = tool({"info", "base.qcow2"});
        EXPECT_EQ(info.status, 0) << info.text();
        EXPECT_THAT(info.out, AllOf(HasSubstr("4 MiB"), HasSubstr("cluster size"))) << info.text();
        EXPECT_THAT(info.err, AllOf(HasSubstr("warning: "), HasSubstr("snapshot"))) << info.text();
        EXPECT_EQ(json::parse(tool({"info", "--json", "base.qcow2"}).out)["warnings"].size(), 1);
        expect_refusal({"snapshot", "--list", "base.qcow2"}, HasSubstr("snapshot"));
        expect_refusal({"read", "-l", "before", "base.qcow2", "0", "1"}, HasSubstr("snapshot"));
        EXPECT_EQ(read({"base.qcow2", "0", "1"}), "C");
        must_tool({"map", "base.qcow2"});
        must_tool({"convert", "base.qcow2", "out.raw"});
        EXPECT_EQ(tool({"check", "base.qcow2"}).status, 2);
    }
}

/// A header, a refcount table and a block: the writer did not write the zeros of the L1 table behind them.
TEST_F(Opening, AnL1TableThatWasLeftOut) {
    constexpr std::uint64_t cluster = 65536;
    must_qemu_img({"create", "-q", "-f", "qcow2", "left.qcow2", "1G"}, directory_.path());
    const auto whole = bytes_of("left.qcow2");
    ASSERT_EQ(load_be<std::uint64_t>(std::as_bytes(std::span(whole)), 40), 3 * cluster);
    for (const std::uint64_t length : {3 * cluster, 3 * cluster + 8}) {
        put("left.qcow2", whole.substr(0, length));
        EXPECT_THAT(must_tool({"info", "left.qcow2"}).out, HasSubstr("1 GiB"));
        EXPECT_EQ(read({"left.qcow2", "1M", "1"}), "\0"s);
        EXPECT_EQ(json::parse(must_tool({"map", "--json", "left.qcow2"}).out).size(), 1);
        EXPECT_THAT(must_tool({"check", "left.qcow2"}).out, HasSubstr("clean"));
        must_qemu_img({"check", "-q", "left.qcow2"}, directory_.path());
        EXPECT_EQ(bytes_of("left.qcow2").size(), length);
        // Both write to it, whoever comes first.
        const auto ours = [&](const std::string& at) {
            EXPECT_EQ(shell("printf ours | qcow write left.qcow2 " + at).status, 0);
        };
        const auto theirs = [&](const std::string& at) {
            must_qemu_io("left.qcow2", "qcow2", {"write -q -P 84 " + at + " 64k"}, directory_.path());
        };
        for (const bool first : {true, false}) {
            put("left.qcow2", whole.substr(0, length));
            first ? ours("1M") : theirs("900M");
            first ? theirs("900M") : ours("1M");
            must_qemu_img({"check", "-q", "left.qcow2"}, directory_.path());
            EXPECT_THAT(must_tool({"check", "left.qcow2"}).out, HasSubstr("clean"));
            EXPECT_EQ(read({"left.qcow2", "1M", "5"}), "ours\0"s);
            EXPECT_EQ(read({"left.qcow2", "900M", "2"}), "TT");
        }
    }
}

/// What is at the end of the file was cut off, and the rest looks like an image without data.
TEST_F(Opening, AnL1TableThatWasCut) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "whole.qcow2", "16M"}, directory_.path());
    must_qemu_io("whole.qcow2", "qcow2", {"write -q -P 7 0 16M"}, directory_.path());
    // In the refcount block in front of the L1 table; and before an L1 table that growth has moved to the end.
    auto in_block = bytes_of("whole.qcow2");
    ASSERT_EQ(load_be<std::uint64_t>(std::as_bytes(std::span(in_block)), 40), 3 * 65536U);
    in_block.resize(180'000);
    must_tool({"resize", "whole.qcow2", "5T"});
    auto at_end = bytes_of("whole.qcow2");
    at_end.resize(load_be<std::uint64_t>(std::as_bytes(std::span(at_end)), 40));
    for (const auto& cut : {in_block, at_end}) {
        put("cut.qcow2", cut);
        expect_refusal({"convert", "cut.qcow2", "out.raw"},
                       AllOf(HasSubstr("the L1 table"), HasSubstr("the file was cut")));
        expect_refusal({"resize", "cut.qcow2", "6T"}, HasSubstr("check the image before it is written"));
        EXPECT_EQ(tool({"check", "cut.qcow2"}).status, 2);
        EXPECT_EQ(bytes_of("cut.qcow2"), cut);
    }
}

/// An L2 table that lies at the end of a file, the end of which was cut off.
TEST_F(Opening, AnL2TableThatWasCut) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "cut.qcow2", "16M"}, directory_.path());
    must_qemu_io("cut.qcow2", "qcow2", {"write -q -P 7 0 64k", "write -q -P 9 8M 64k"}, directory_.path());
    auto bytes = bytes_of("cut.qcow2");
    bytes.resize((bytes.size() + 65535) / 65536 * 65536);
    const auto span = [&] { return std::as_writable_bytes(std::span(bytes)); };
    const auto l1 = load_be<std::uint64_t>(span(), 40);
    const auto l2 = load_be<std::uint64_t>(span(), l1) & ~(std::uint64_t{1} << 63);
    const auto refcounts = load_be<std::uint64_t>(span(), load_be<std::uint64_t>(span(), 48));
    const auto end = bytes.size();
    store_be(span(), l1, std::uint64_t{end} | std::uint64_t{1} << 63);
    store_be(span(), refcounts + end / 65536 * 2, std::uint16_t{1});
    put("cut.qcow2", bytes + bytes.substr(l2, 512));
    expect_refusal({"convert", "cut.qcow2", "out.raw"}, HasSubstr("the file was cut"));
    expect_refusal({"resize", "cut.qcow2", "4G"},
                   AllOf(HasSubstr("the L2 table"), HasSubstr("a write would make lost data look like zeros")));
    EXPECT_EQ(bytes_of("cut.qcow2").size(), end + 512);
}

TEST_F(Opening, AnEntryThatLeadsElsewhereInTheDataFile) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "-o", "data_file=data", "disk.qcow2", "16M"}, directory_.path());
    must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 1 0 64k", "write -q -P 2 64k 64k"}, directory_.path());
    const auto bytes = bytes_of("disk.qcow2");
    const auto l1 = load_be<std::uint64_t>(std::as_bytes(std::span(bytes)), 40);
    const auto l2 = load_be<std::uint64_t>(std::as_bytes(std::span(bytes)), l1) & ~(std::uint64_t{1} << 63);
    poke("disk.qcow2", l2 + 8, std::uint64_t{1} << 63);  // guest cluster 1, at the place of guest cluster 0
    EXPECT_EQ(read({"disk.qcow2", "0", "1"}), "\1");
    expect_refusal({"read", "disk.qcow2", "64k", "1"}, HasSubstr("where the guest's cluster lies in the data file"));
    EXPECT_EQ(tool({"check", "disk.qcow2"}).status, 2);
    const auto written = shell("printf x | qcow write disk.qcow2 64k");
    EXPECT_EQ(written.status, 1);
    EXPECT_THAT(written.err, HasSubstr("marked as corrupt"));
    EXPECT_EQ(bytes_of("data").substr(0, 65536), std::string(65536, '\1'));
}

TEST_F(Opening, AMarkOfCorruptionWithoutDamage) {
    must_tool({"create", "-q", "disk.qcow2", "1M"});
    poke("disk.qcow2", 72, std::uint64_t{2});
    const auto refused = tool({"resize", "disk.qcow2", "2M"});
    EXPECT_EQ(refused.status, 1);
    EXPECT_THAT(refused.err, AllOf(HasSubstr("marked as corrupt"), HasSubstr("qcow check")));
    EXPECT_THAT(must_tool({"check", "disk.qcow2"}).out,
                AllOf(HasSubstr("no damage was found"), HasSubstr("qcow check -r all disk.qcow2")));
    EXPECT_EQ(json::parse(must_tool({"check", "--json", "disk.qcow2"}).out)["marked-corrupt"], true);
    must_tool({"check", "-r", "all", "disk.qcow2"});
    must_tool({"resize", "disk.qcow2", "2M"});
}

TEST_F(Opening, ABackingFormatThatIsEmpty) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "over.qcow2"}, directory_.path());
    auto bytes = bytes_of("over.qcow2");
    ASSERT_EQ(bytes.substr(120, 5), "qcow2");
    store_be(std::as_writable_bytes(std::span(bytes)), 116, std::uint32_t{0});
    bytes.replace(120, 8, 8, '\0');
    put("over.qcow2", bytes);
    const auto read = tool({"read", "over.qcow2", "0", "1"});
    EXPECT_EQ(read.out, "C");
    EXPECT_THAT(read.err, HasSubstr("its format is not recorded"));
}

TEST_F(Opening, ARefusalNamesTheFileOnce) {
    poke("base.qcow2", 60, std::uint32_t{1} << 28);
    const auto refused = tool({"resize", "base.qcow2", "8M"});
    EXPECT_EQ(refused.status, 1);
    EXPECT_THAT(refused.err, AllOf(HasSubstr("nb_snapshots"), Not(HasSubstr("base.qcow2: base.qcow2"))));
}

/// The mark of a raw data file, of an image that has none.
TEST_F(Opening, AMarkThatSaysNothingGoesWithTheFirstWrite) {
    must_tool({"create", "-q", "disk.qcow2", "1M"});
    poke("disk.qcow2", 88, std::uint64_t{2});
    EXPECT_EQ(tool({"check", "disk.qcow2"}).status, 2);
    must_tool({"resize", "disk.qcow2", "2M"});
    EXPECT_THAT(must_tool({"check", "disk.qcow2"}).out, HasSubstr("clean"));
}

TEST_F(Opening, AFileThatWasCut) {
    put("disk.raw", [] {
        std::string bytes;
        for (int i = 0; i < 60'000; ++i) bytes += "line " + std::to_string(i * 7919LL % 60'013) + "\n";
        return bytes;
    }());
    for (const bool compressed : {false, true}) {
        Arguments convert = {"convert", "-f", "raw", "-O", "qcow2"};
        if (compressed) convert.emplace_back("-c");
        convert.insert(convert.end(), {"disk.raw", "whole.qcow2"});
        must_qemu_img(convert, directory_.path());
        const auto whole = bytes_of("whole.qcow2");
        // In the data, before the mapping, and behind the first of the metadata.
        for (const auto length :
             {whole.size() - 70'000, std::size_t{300'000}, std::size_t{200'000}, std::size_t{65536}}) {
            put("cut.qcow2", whole.substr(0, length));
            EXPECT_THAT(must_tool({"info", "cut.qcow2"}).out, HasSubstr("qcow2, version 3"));
            const auto cut = AllOf(HasSubstr("the file was cut"), HasSubstr(fmt::format("({} bytes)", length)));
            expect_refusal({"convert", "cut.qcow2", "out.raw"}, cut);
            const auto read = tool({"read", "cut.qcow2", "0", std::to_string(bytes_of("disk.raw").size())});
            EXPECT_EQ(read.status, 1);
            EXPECT_THAT(read.err, cut);
            if (length > 200'000) {
                EXPECT_THAT(read.err, HasSubstr("the complete one has about")) << read.err;
            }
            EXPECT_EQ(tool({"check", "cut.qcow2"}).status, 2);
        }
    }
}

TEST_F(Opening, ADataFileThatWasCut) {
    must_tool({"create", "-q", "-o", "data_file=data.raw", "data.qcow2", "4M"});
    must_tool({"convert", "-n", "-O", "qcow2", "base.qcow2", "data.qcow2"});
    std::filesystem::resize_file(directory_.file("data.raw"), 4096);
    // How long the image file ought to be says nothing of it.
    expect_refusal(
        {"read", "data.qcow2", "64k", "1"},
        AllOf(HasSubstr("data.raw"), HasSubstr("(4096 bytes): the file was cut"), Not(HasSubstr("complete"))));
}

/// Where nothing is stored, there is nothing to be decrypted; but no other encrypted image is read either.
TEST_F(Opening, AnEncryptedImageWithNothingInIt) {
    must_tool({"create", "-q", "secret.qcow2", "1M"});
    poke("secret.qcow2", 32, std::uint32_t{1});  // AES
    must_tool({"create", "-q", "-u", "-b", "secret.qcow2", "-F", "qcow2", "over.qcow2", "1M"});
    must_tool({"info", "secret.qcow2"});
    must_tool({"map", "secret.qcow2"});
    for (const std::string image : {"secret.qcow2", "over.qcow2"}) {
        expect_refusal({"convert", image, "out.raw"}, HasSubstr("encrypted"));
        expect_refusal({"convert", "-O", "qcow2", image, "out.qcow2"}, HasSubstr("encrypted"));
        expect_refusal({"convert", "base.qcow2", image, "out.raw"}, HasSubstr("encrypted"));
        expect_refusal({"serve", "-r", "--socket", "s", image}, HasSubstr("encrypted"));
        expect_refusal({"read", image, "0", "1"}, HasSubstr("encrypted"));
    }
    EXPECT_FALSE(files().contains("out.raw"));
}

}  // namespace
}  // namespace qcow::test
