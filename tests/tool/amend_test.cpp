// qcow amend, against QEMU: the options change, the contents stay.

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "qcow/amend.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

class AmendTest : public ToolTest {
protected:
    void SetUp() override {}

    void qemu_img(const Arguments& arguments) const { must_qemu_img(arguments, directory_.path()); }
    void qemu_io(const std::string& file, const Arguments& commands) const {
        must_qemu_io(file, "qcow2", commands, directory_.path());
    }
    /// An image of 4 MiB with data.
    void make(const std::string& options, const Arguments& rest = {}) const {
        Arguments create = {"create", "-q", "-f", "qcow2"};
        if (!options.empty()) create.insert(create.end(), {"-o", options});
        create.insert(create.end(), rest.begin(), rest.end());
        create.insert(create.end(), {"disk.qcow2", "4M"});
        qemu_img(create);
        qemu_io("disk.qcow2", {"write -q -P 1 100k 300k", "write -q -P 2 2M 1M"});
    }
    void amend(const std::string& options) const { must_tool({"amend", "-o", options, "disk.qcow2"}); }
    void expect_refusal_of(const std::string& options, const testing::Matcher<std::string>& message) const {
        const auto before = bytes_of("disk.qcow2");
        expect_refusal({"amend", "-o", options, "disk.qcow2"}, message);
        EXPECT_TRUE(bytes_of("disk.qcow2") == before) << options;
    }

    [[nodiscard]] std::string contents() const {
        qemu_img({"convert", "-f", "qcow2", "-O", "raw", "disk.qcow2", "contents.raw"});
        return bytes_of("contents.raw");
    }
    [[nodiscard]] json info() const {
        return qemu_img_json({"info", "--output=json", "disk.qcow2"}, directory_.path());
    }
    [[nodiscard]] json format() const { return info()["format-specific"]["data"]; }
    void expect_sound() const {
        qemu_img({"check", "-q", "disk.qcow2"});
        EXPECT_THAT(must_tool({"check", "disk.qcow2"}).out, HasSubstr("clean"));
        if (format().contains("data-file")) return;
        // QEMU writes to it, too.
        std::filesystem::copy_file(directory_.file("disk.qcow2"), directory_.file("written.qcow2"),
                                   std::filesystem::copy_options::overwrite_existing);
        qemu_io("written.qcow2", {"write -q -P 3 0 4M"});
        qemu_img({"check", "-q", "written.qcow2"});
    }
};

TEST_F(AmendTest, BothVersions) {
    for (const auto* kind : {"compat=0.10", "compat=0.10,cluster_size=512", "compat=0.10,cluster_size=2M"}) {
        make(kind);
        const auto before = contents();
        amend("compat=1.1");
        EXPECT_EQ(format()["compat"], "1.1");
        expect_sound();
        amend("compat=1.1,lazy_refcounts=on");
        EXPECT_EQ(format()["lazy-refcounts"], true);
        expect_sound();
        amend("compat=0.10");
        EXPECT_EQ(format()["compat"], "0.10");
        expect_sound();
        amend("compat=v3,refcount_bits=1,lazy_refcounts");
        EXPECT_EQ(format()["refcount-bits"], 1);
        expect_sound();
        amend("compat=v2,refcount_bits=16");
        EXPECT_EQ(format()["compat"], "0.10");
        expect_sound();
        EXPECT_TRUE(contents() == before);
    }
}

/// Names and formats of backing files move with the end of the header.
TEST_F(AmendTest, BackingFilesStay) {
    qemu_img({"create", "-q", "-f", "raw", "base.raw", "4M"});
    must_qemu_io("base.raw", "raw", {"write -q -P 7 0 1M"}, directory_.path());
    for (const auto& name : {std::string("base.raw"), directory_.file(std::string(200, 'b')) + "/../base.raw"}) {
        std::filesystem::create_directory(directory_.file(std::string(200, 'b')));
        make("compat=0.10,cluster_size=4k", {"-b", name, "-F", "raw"});
        const auto before = contents();
        for (const auto* compat : {"compat=1.1", "compat=0.10"}) {
            amend(compat);
            EXPECT_EQ(info()["backing-filename"], name);
            EXPECT_EQ(info()["backing-filename-format"], "raw");
            EXPECT_TRUE(contents() == before);
            expect_sound();
        }
    }
}

/// Version 2 has no zero clusters.
TEST_F(AmendTest, ZeroClustersAreExpanded) {
    qemu_img({"create", "-q", "-f", "qcow2", "base.qcow2", "3M"});
    must_qemu_io("base.qcow2", "qcow2", {"write -q -P 7 0 1M", "write -q -P 8 1500k 700k"}, directory_.path());
    const Arguments zeros = {"write -q -z 0 128k", "write -q -z 1M 1M", "write -q -P 5 3200k 200k",
                             "write -q -z 3264k 64k", "write -q -z 3500k 548k"};
    for (const bool backed : {false, true}) {
        make("", backed ? Arguments{"-b", "base.qcow2", "-F", "qcow2"} : Arguments());
        qemu_io("disk.qcow2", zeros);
        const auto before = contents();
        amend("compat=0.10");
        EXPECT_EQ(format()["compat"], "0.10");
        EXPECT_TRUE(contents() == before);
        expect_sound();
    }
    // What nothing shows through takes no space.
    qemu_img({"create", "-q", "-f", "qcow2", "disk.qcow2", "1G"});
    qemu_io("disk.qcow2", {"write -q -z 0 1G"});
    const auto size = std::filesystem::file_size(directory_.file("disk.qcow2"));
    amend("compat=0.10");
    EXPECT_LE(std::filesystem::file_size(directory_.file("disk.qcow2")), size);
    EXPECT_EQ(must_tool({"map", "--json", "disk.qcow2"}).out.find("\"present\": true"), std::string::npos);
}

TEST_F(AmendTest, EveryWidthOfRefcounts) {
    for (const auto* kind : {"", "cluster_size=512", "extended_l2=on", "data_file=disk.data"}) {
        make(kind);
        const auto before = contents();
        if (std::string(kind).empty()) qemu_img({"bitmap", "--add", "disk.qcow2", "kept"});
        for (const int bits : {1, 64, 2, 32, 4, 8, 16}) {
            amend(fmt::format("refcount_bits={}", bits));
            EXPECT_EQ(format()["refcount-bits"], bits);
            EXPECT_TRUE(contents() == before);
            expect_sound();
        }
        EXPECT_EQ(format().contains("bitmaps"), std::string(kind).empty());
    }
    make("");
    qemu_img({"snapshot", "-c", "a", "disk.qcow2"});
    qemu_img({"snapshot", "-c", "b", "disk.qcow2"});
    expect_refusal_of("refcount_bits=1", AllOf(HasSubstr("host offset"), HasSubstr("3 references")));
    amend("refcount_bits=2");
    expect_sound();
    expect_refusal_of("refcount_bits=3", HasSubstr("power of two"));
}

TEST_F(AmendTest, OtherOptions) {
    make("");
    amend("size=6M,lazy_refcounts=on,compression_type=zstd");
    EXPECT_EQ(info()["virtual-size"], 6U << 20);
    EXPECT_EQ(format()["lazy-refcounts"], true);
    EXPECT_EQ(format()["compression-type"], "zstd");
    expect_sound();
    qemu_io("disk.qcow2", {"write -q -c -P 9 5M 64k"});
    expect_refusal_of("compression_type=zlib", AllOf(HasSubstr("compressed clusters"), HasSubstr("qcow convert")));
    amend("compression_type=zstd");
    make("");
    amend("compression_type=zstd");
    amend("compression_type=zlib,lazy_refcounts=off");
    EXPECT_EQ(format()["compression-type"], "zlib");
    expect_sound();
    make("data_file=disk.data,data_file_raw=on");
    const auto before = contents();
    std::filesystem::rename(directory_.file("disk.data"), directory_.file("moved.data"));
    std::filesystem::copy(directory_.file("moved.data"), directory_.file("disk.data"));
    amend("data_file=moved.data");
    EXPECT_EQ(format()["data-file"], "moved.data");
    EXPECT_EQ(format()["data-file-raw"], true);
    amend("data_file_raw=off");
    EXPECT_EQ(format()["data-file-raw"], false);
    EXPECT_TRUE(contents() == before);
}

TEST_F(AmendTest, RecordsABackingFile) {
    make("");
    amend("backing_file=base.raw,backing_fmt=raw,lazy_refcounts=on");  // nobody looks whether it is there
    EXPECT_EQ(info()["backing-filename"], "base.raw");
    EXPECT_EQ(info()["backing-filename-format"], "raw");
    EXPECT_EQ(format()["lazy-refcounts"], true);
    qemu_img({"create", "-q", "-f", "raw", "base.raw", "1M"});
    amend("backing_file=./base.raw,backing_fmt=raw");
    EXPECT_EQ(info()["backing-filename"], "./base.raw");
    expect_sound();
}

TEST_F(AmendTest, NoFileGetsTwoRoles) {
    qemu_img({"create", "-q", "-f", "raw", "base.raw", "1M"});
    make("data_file=disk.data", {"-b", "base.raw", "-F", "raw"});
    qemu_img({"create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "above.qcow2"});
    for (const auto* name : {"base.raw", "disk.qcow2", "./disk.qcow2"})
        expect_refusal_of(std::string("data_file=") + name, HasSubstr("would overwrite"));
    for (const auto* name : {"disk.qcow2", "above.qcow2", "disk.data"})
        expect_refusal_of(std::string("backing_fmt=qcow2,backing_file=") + name, HasSubstr("would overwrite"));
    expect_refusal_of("data_file=missing", HasSubstr("cannot open"));
    // One that was moved.
    const auto before = contents();
    std::filesystem::rename(directory_.file("disk.data"), directory_.file("moved.data"));
    amend("data_file=moved.data");
    EXPECT_EQ(format()["data-file"], "moved.data");
    EXPECT_TRUE(contents() == before);
    // As a backing file that was moved.
    std::filesystem::rename(directory_.file("base.raw"), directory_.file("moved.raw"));
    amend("backing_file=moved.raw,backing_fmt=raw");
    EXPECT_TRUE(contents() == before);
}

/// Nobody else has locked it, and the right name can be recorded.
TEST_F(AmendTest, ADataFileThatIsTheImageItself) {
    make("data_file=disk.qcowX");
    auto bytes = bytes_of("disk.qcow2");
    bytes.replace(bytes.find("disk.qcowX"), 10, "disk.qcow2");
    put_file(directory_.file("disk.qcow2"), bytes);
    expect_refusal({"zero", "disk.qcow2", "0", "512"}, HasSubstr("used twice"));
    amend("data_file=disk.qcowX");
    EXPECT_EQ(contents().substr(100 << 10, 300 << 10), std::string(300 << 10, '\1'));
}

/// Old writers gave snapshots of version 2 no extra data.
TEST_F(AmendTest, SnapshotsGetWhatVersion3Requires) {
    make("compat=0.10,cluster_size=4k");
    qemu_img({"snapshot", "-c", "first", "disk.qcow2"});
    qemu_img({"snapshot", "-c", "second", "disk.qcow2"});
    auto bytes = bytes_of("disk.qcow2");
    const auto number = [&](std::size_t at, unsigned width) {
        std::uint64_t value = 0;
        for (unsigned i = 0; i < width; ++i) value = value << 8 | static_cast<unsigned char>(bytes[at + i]);
        return value;
    };
    std::string table;
    for (auto at = number(64, 8); table.size() < 96; at += 80) {  // entries of 40 + 24 + 1 + 5 or 6 bytes, padded
        const auto extra = number(at + 36, 4);
        ASSERT_EQ(extra, 24U);
        const auto names = number(at + 12, 2) + number(at + 14, 2);
        auto entry = bytes.substr(at, 36) + std::string(4, '\0') + bytes.substr(at + 40 + extra, names);
        entry.resize((entry.size() + 7) / 8 * 8);
        table += entry;
        at = at + (40 + extra + names + 7) / 8 * 8 - 80;
    }
    bytes.replace(number(64, 8), table.size(), table);
    put_file(directory_.file("disk.qcow2"), bytes);
    const auto before = contents();
    ASSERT_EQ(info()["snapshots"].size(), 2U);
    amend("compat=1.1,refcount_bits=32");
    EXPECT_EQ(format()["compat"], "1.1");
    EXPECT_EQ(info()["snapshots"][1]["name"], "second");
    expect_sound();
    qemu_img({"snapshot", "-a", "first", "disk.qcow2"});
    EXPECT_TRUE(contents() == before);
}

TEST_F(AmendTest, NamesAllThatStandsInTheWay) {
    make("refcount_bits=32,extended_l2=on,compression_type=zstd");
    qemu_img({"bitmap", "--add", "disk.qcow2", "b"});
    expect_refusal_of("compat=0.10", AllOf(HasSubstr("refcount_bits"), HasSubstr("extended L2"), HasSubstr("zlib"),
                                           HasSubstr("qcow bitmap --remove")));
    make("data_file=disk.data");
    expect_refusal_of("compat=0.10", HasSubstr("external data file"));
    expect_refusal_of("data_file_raw=on", HasSubstr("qcow convert"));
    make("");
    expect_refusal_of("compat=0.10,lazy_refcounts=on", HasSubstr("lazy_refcounts"));
    expect_refusal_of("data_file=x", HasSubstr("no external data file"));
    expect_refusal_of("size=1M", AllOf(HasSubstr(" bytes;"), HasSubstr("qcow resize --shrink")));
    expect_refusal_of("backing_file=", HasSubstr("qcow rebase -u -b \"\""));
    expect_refusal_of("backing_file=x", HasSubstr("format"));
    expect_refusal_of("backing_fmt=raw", HasSubstr("give backing_file, too"));
    expect_refusal_of("cluster_size=4k", HasSubstr("qcow convert"));
    qemu_io("disk.qcow2", {"write -q -z 0 64k"});
    qemu_img({"snapshot", "-c", "s", "disk.qcow2"});
    expect_refusal_of("compat=0.10", HasSubstr("zero clusters"));
    qemu_img({"resize", "-q", "disk.qcow2", "5M"});
    expect_refusal_of("compat=0.10,size=6M", HasSubstr("snapshot \"s\" has another size than the disk; remove it"));
    make("compat=0.10");
    for (const auto* option : {"refcount_bits=8", "lazy_refcounts=on", "compression_type=zstd"})
        expect_refusal_of(option, HasSubstr("version 2"));
    qemu_img({"create", "-q", "-f", "raw", "disk.raw", "1M"});
    expect_refusal({"amend", "-f", "raw", "-o", "compat=1.1", "disk.raw"}, HasSubstr("only qcow2"));
    expect_refusal({"amend", "disk.qcow2"}, HasSubstr("-o"));
}

}  // namespace
}  // namespace qcow::test
