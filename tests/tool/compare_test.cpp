// qcow compare beside qemu-img compare.

#include <nlohmann/json.hpp>

#include "support/random.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

class CompareTool : public ToolTest {
protected:
    void SetUp() override {
        // Data, zeros that are stored, holes; an end within a cluster.
        auto random = Random::named("qcow compare");
        auto bytes = random.bytes(900 * 1024);
        bytes.replace(300 * 1024, 200 * 1024, 200 * 1024, '\0');
        put_file(file("disk.raw"), bytes);
        std::filesystem::resize_file(file("disk.raw"), 2 * 1024 * 1024 + 3 * 512);
    }

    [[nodiscard]] std::string file(const std::string& name) const { return directory_.file(name); }

    /// Makes images with the contents of disk.raw. Returns the names, each of which ends in its format.
    std::vector<std::string> make_images() const {
        std::vector<std::string> names = {"disk.raw"};
        const auto convert = [&](const std::string& name, const std::string& format, Arguments options) {
            options.insert(options.begin(), {"convert", "-O", format});
            options.insert(options.end(), {"disk.raw", name});
            must_qemu_img(options, directory_.path());
            names.push_back(name);
        };
        convert("full.raw", "raw", {"-S", "0"});
        convert("plain.qcow2", "qcow2", {});
        convert("full.qcow2", "qcow2", {"-S", "0"});
        convert("deflate.qcow2", "qcow2", {"-c"});
        convert("zstd.qcow2", "qcow2", {"-c", "-o", "compression_type=zstd"});
        convert("extended.qcow2", "qcow2", {"-o", "extended_l2=on,cluster_size=64k"});
        convert("small.qcow2", "qcow2", {"-o", "cluster_size=512"});
        convert("old.qcow2", "qcow2", {"-o", "compat=0.10"});
        convert("metadata.qcow2", "qcow2", {"-o", "preallocation=metadata"});
        convert("falloc.qcow2", "qcow2", {"-o", "preallocation=falloc"});
        convert("data.qcow2", "qcow2", {"-o", "data_file=data"});
        convert("version1.qcow", "qcow", {});
        // Half of the contents in a base, with something else behind zeros.
        must_qemu_img({"create", "-q", "-f", "qcow2", "base.qcow2", "4M"}, directory_.path());
        must_qemu_io("base.qcow2", "qcow2", {"write -q -P 66 0 1M", "write -q -P 67 1M 1M"}, directory_.path());
        must_qemu_img({"create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "overlay.qcow2",
                       std::to_string(std::filesystem::file_size(file("disk.raw")))},
                      directory_.path());
        must_qemu_img({"convert", "-n", "-O", "qcow2", "disk.raw", "overlay.qcow2"}, directory_.path());
        names.emplace_back("overlay.qcow2");
        return names;
    }

    static std::string format_of(const std::string& name) { return name.substr(name.rfind('.') + 1); }

    /// Both tools say the same, and end with the same status.
    void expect_as_qemu(const std::string& a, const std::string& b, Arguments options = {}) const {
        options.insert(options.begin(), "compare");
        options.insert(options.end(), {"-f", format_of(a), "-F", format_of(b), a, b});
        const auto theirs = qemu_img(options, directory_.path());
        const auto ours = tool(options);
        EXPECT_EQ(ours.status, theirs.status) << ours.text() << theirs.text();
        EXPECT_EQ(ours.out, theirs.out) << ours.text() << theirs.text();
        EXPECT_EQ(ours.err, "") << ours.text();
    }
};

TEST_F(CompareTool, EveryKindOfImageIsTheSame) {
    const auto names = make_images();
    for (std::size_t i = 0; i < names.size(); ++i) {
        expect_as_qemu(names[i], "disk.raw");
        expect_as_qemu(names[i], names[(i + 1) % names.size()]);
        EXPECT_EQ(must_tool({"compare", "-f", format_of(names[i]), "-F", "raw", names[i], "disk.raw"}).out,
                  "Images are identical.\n");
    }
}

TEST_F(CompareTool, OneByteDiffers) {
    const auto names = make_images();
    auto bytes = bytes_of("disk.raw");
    for (const std::size_t at : {std::size_t{0}, std::size_t{700'001}, std::size_t{350'000}, bytes.size() - 1}) {
        auto changed = bytes;
        changed[at] = static_cast<char>(changed[at] ^ 1);
        put_file(file("changed.raw"), changed);
        for (const auto& name : names) expect_as_qemu(name, "changed.raw");
        expect_as_qemu("changed.raw", "overlay.qcow2");
        EXPECT_EQ(tool({"compare", "-f", "raw", "-F", "raw", "-q", "disk.raw", "changed.raw"}).out, "");
        const auto found = json::parse(tool({"compare", "--json", "plain.qcow2", "changed.raw"}).out);
        EXPECT_EQ(found["identical"], false);
        EXPECT_EQ(found["first-difference"]["offset"], at);
        EXPECT_EQ(found["first-difference"]["kind"], "contents");
    }
}

TEST_F(CompareTool, Strict) {
    make_images();
    // QEMU compares where runs end, too: its verdict on equal allocation depends on how the file is fragmented.
    const auto status = [&](const Arguments& images) {
        auto arguments = Arguments{"compare", "-s"};
        arguments.insert(arguments.end(), images.begin(), images.end());
        const auto ours = tool(arguments);
        EXPECT_EQ(ours.status, qemu_img(arguments, directory_.path()).status) << ours.text();
        return ours.status;
    };
    std::filesystem::copy_file(file("plain.qcow2"), file("copy.qcow2"));
    must_qemu_img({"create", "-q", "-f", "qcow2", "-b", "plain.qcow2", "-F", "qcow2", "empty.qcow2"},
                  directory_.path());
    for (const auto* same : {"plain.qcow2", "copy.qcow2", "empty.qcow2", "old.qcow2", "data.qcow2"})
        EXPECT_EQ(status({"plain.qcow2", same}), 0) << same;
    for (const auto* other : {"disk.raw", "full.raw", "full.qcow2", "deflate.qcow2", "metadata.qcow2", "overlay.qcow2"})
        EXPECT_EQ(status({"plain.qcow2", other}), 1) << other;
    expect_as_qemu("plain.qcow2", "deflate.qcow2", {"-s"});
    const auto found = json::parse(tool({"compare", "-s", "--json", "plain.qcow2", "deflate.qcow2"}).out);
    EXPECT_EQ(found["first-difference"], (json{{"offset", 0}, {"kind", "allocation"}}));
}

TEST_F(CompareTool, OtherSizes) {
    for (const std::uint64_t more : {std::uint64_t{1}, std::uint64_t{512}, std::uint64_t{64} << 20}) {
        std::filesystem::copy_file(file("disk.raw"), file("longer.raw"),
                                   std::filesystem::copy_options::overwrite_existing);
        const auto size = std::filesystem::file_size(file("disk.raw"));
        std::filesystem::resize_file(file("longer.raw"), size + more);
        for (const Arguments& options : {Arguments{}, Arguments{"-s"}}) {
            expect_as_qemu("disk.raw", "longer.raw", options);
            expect_as_qemu("longer.raw", "disk.raw", options);
        }
        must_qemu_io("longer.raw", "raw", {"write -q -P 1 " + std::to_string(size + more / 512 * 512 - 1) + " 1"},
                     directory_.path());
        for (const Arguments& options : {Arguments{}, Arguments{"-s"}, Arguments{"-q"}}) {
            expect_as_qemu("disk.raw", "longer.raw", options);
            expect_as_qemu("longer.raw", "disk.raw", options);
        }
    }
}

TEST_F(CompareTool, AllDifferences) {
    auto bytes = bytes_of("disk.raw");
    bytes[1000] = static_cast<char>(bytes[1000] ^ 1);
    bytes[1001] = static_cast<char>(bytes[1001] ^ 1);
    bytes[1'000'000] = 1;  // in a hole
    put_file(file("changed.raw"), bytes + std::string(512, '\0'));
    const auto text = tool({"compare", "-f", "raw", "-F", "raw", "--all", "disk.raw", "changed.raw"});
    EXPECT_EQ(text.status, 1);
    EXPECT_THAT(text.out, AllOf(StartsWith("START"), HasSubstr("0x0000000003e8"), HasSubstr("0x0000000f4240"),
                                HasSubstr("Warning: Image size mismatch!\n"),
                                HasSubstr("3 bytes differ, the first difference is at offset 1000\n")));
    const auto found =
        json::parse(tool({"compare", "-f", "raw", "-F", "raw", "--all", "--json", "disk.raw", "changed.raw"}).out);
    EXPECT_EQ(found["differences"], (json{{{"start", 1000}, {"length", 2}, {"kind", "contents"}},
                                          {{"start", 1'000'000}, {"length", 1}, {"kind", "contents"}}}));
    EXPECT_EQ(found["different-bytes"], 3);
    EXPECT_EQ(found["first-difference"]["offset"], 1000);
    EXPECT_EQ(found["images"][1]["filename"], "changed.raw");
    EXPECT_EQ(found["images"][1]["virtual-size"], bytes.size() + 512);
    const auto same =
        json::parse(must_tool({"compare", "-f", "raw", "-F", "raw", "--all", "--json", "disk.raw", "disk.raw"}).out);
    EXPECT_EQ(same["differences"], json::array());
    EXPECT_EQ(same["identical"], true);
}

TEST_F(CompareTool, DamageIsNoVerdict) {
    ToolTest::SetUp();
    must_qemu_img({"convert", "-O", "raw", "base.qcow2", "base.raw"}, directory_.path());
    corrupt_l2_entry();
    const Arguments arguments = {"compare", "base.qcow2", "base.raw"};
    auto ours = tool(arguments);
    EXPECT_EQ(ours.status, 3) << ours.text();
    EXPECT_EQ(ours.status, qemu_img(arguments, directory_.path()).status);
    EXPECT_EQ(ours.out, "");
    EXPECT_THAT(ours.err, AllOf(StartsWith("qcow: "), HasSubstr("base.qcow2")));
    ours = tool({"compare", "--all", "--json", "base.raw", "base.qcow2"});
    EXPECT_EQ(ours.status, 3) << ours.text();
    EXPECT_TRUE(json::accept(ours.out));

    must_qemu_img({"convert", "-c", "-O", "qcow2", "disk.raw", "broken.qcow2"}, directory_.path());
    auto bytes = bytes_of("broken.qcow2");
    bytes.replace(5 * 65536, 65536, 65536, '\xff');  // compressed data
    put_file(file("broken.qcow2"), bytes);
    ours = tool({"compare", "broken.qcow2", "disk.raw"});
    EXPECT_EQ(ours.status, 4) << ours.text();
    EXPECT_EQ(ours.out, "");
}

TEST_F(CompareTool, ErrorsAreNoVerdict) {
    const auto expect_error = [&](const Arguments& arguments, const std::string& what) {
        const auto ours = tool(arguments);
        EXPECT_EQ(ours.status, 2) << ours.text();
        EXPECT_EQ(ours.out, "") << ours.text();
        EXPECT_THAT(ours.err, AllOf(StartsWith("qcow: "), HasSubstr(what)));
        EXPECT_EQ(std::ranges::count(ours.err, '\n'), 1) << ours.text();
    };
    expect_error({"compare", "absent", "disk.raw"}, "absent");
    expect_error({"compare", "disk.raw", "absent"}, "absent");
    expect_error({"compare", "-F", "qcow2", "disk.raw", "disk.raw"}, "not a qcow2 image");
    expect_error({"compare", "disk.raw"}, "B is missing");
    expect_error({"compare", "disk.raw", "-"}, "standard input");
    expect_error({"compare", "--no-such-option", "disk.raw", "disk.raw"}, "--no-such-option");
    expect_error({"compare", "-f", "vmdk", "disk.raw", "disk.raw"}, "vmdk");
}

}  // namespace
}  // namespace qcow::test
