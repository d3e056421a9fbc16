// qcow rebase, against QEMU: what a disk holds stays, whatever its old and new backing files are.

#include <nlohmann/json.hpp>

#include "qcow/rebase.h"
#include "support/effort.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

class RebaseTest : public ToolTest {
protected:
    /// Two bases of 4 MiB with other data in a part of it, and an overlay on the first.
    void SetUp() override {
        qemu_img({"create", "-q", "-f", "qcow2", "old.qcow2", "4M"});
        qemu_io("old.qcow2", "qcow2", {"write -q -P 1 0 1M", "write -q -P 2 1536k 300k", "write -q -P 3 3M 1M"});
        qemu_img({"convert", "-f", "qcow2", "-O", "raw", "old.qcow2", "new.raw"});
        qemu_io("new.raw", "raw", {"write -q -P 9 64k 100k", "write -q -z 1M 1M", "write -q -P 8 2500k 10k"});
        make_overlay("disk.qcow2", {});
    }

    void qemu_img(const Arguments& arguments) const { must_qemu_img(arguments, directory_.path()); }
    void qemu_io(const std::string& file, const std::string& format, const Arguments& commands) const {
        must_qemu_io(file, format, commands, directory_.path());
    }

    /// An overlay of old.qcow2 with data and zeros of its own.
    void make_overlay(const std::string& name, const Arguments& options, const std::string& size = "5M") const {
        Arguments create = {"create", "-q", "-f", "qcow2", "-b", "old.qcow2", "-F", "qcow2"};
        create.insert(create.end(), options.begin(), options.end());
        create.insert(create.end(), {name, size});
        qemu_img(create);
        qemu_io(name, "qcow2", {"write -q -P 5 100k 7k", "write -q -z 3200k 200k", "write -q -P 6 4500k 64k"});
    }

    /// What QEMU reads.
    [[nodiscard]] std::string contents(const std::string& name) const {
        qemu_img({"convert", "-f", "qcow2", "-O", "raw", name, "contents.raw"});
        return bytes_of("contents.raw");
    }
    [[nodiscard]] json info(const std::string& name) const {
        return qemu_img_json({"info", "--output=json", name}, directory_.path());
    }
    void expect_sound(const std::string& name) const {
        qemu_img({"check", "-q", name});
        EXPECT_THAT(must_tool({"check", name}).out, HasSubstr("clean"));
    }
};

TEST_F(RebaseTest, TheContentsStay) {
    const std::vector<Arguments> kinds = {{},
                                          {"-o", "cluster_size=512"},
                                          {"-o", "cluster_size=2M"},
                                          {"-o", "extended_l2=on"},
                                          {"-o", "compat=0.10"},
                                          {"-o", "compression_type=zstd"}};
    for (const auto& kind : fewer(kinds)) {
        for (const bool compress : {false, true}) {
            make_overlay("disk.qcow2", kind);
            const auto before = contents("disk.qcow2");
            Arguments rebase = {"rebase", "-b", "new.raw", "-F", "raw", "disk.qcow2"};
            if (compress) rebase.emplace_back("-c");
            must_tool(rebase);
            EXPECT_TRUE(contents("disk.qcow2") == before);
            EXPECT_EQ(info("disk.qcow2")["backing-filename"], "new.raw");
            EXPECT_EQ(info("disk.qcow2")["backing-filename-format"], "raw");
            expect_sound("disk.qcow2");
            // The old one is needed no more; and back again.
            std::filesystem::rename(directory_.file("old.qcow2"), directory_.file("away"));
            EXPECT_TRUE(contents("disk.qcow2") == before);
            std::filesystem::rename(directory_.file("away"), directory_.file("old.qcow2"));
            must_tool({"rebase", "-b", "old.qcow2", "-F", "qcow2", "disk.qcow2"});
            EXPECT_TRUE(contents("disk.qcow2") == before);
            expect_sound("disk.qcow2");
            must_tool({"rebase", "-b", "", "disk.qcow2"});
            EXPECT_FALSE(info("disk.qcow2").contains("backing-filename"));
            EXPECT_FALSE(info("disk.qcow2").contains("backing-filename-format"));
            EXPECT_TRUE(contents("disk.qcow2") == before);
            expect_sound("disk.qcow2");
        }
    }
}

TEST_F(RebaseTest, BackingFilesOfOtherSizes) {
    const auto before = contents("disk.qcow2");
    qemu_img({"create", "-q", "-f", "raw", "short.raw", "1M"});
    qemu_img({"create", "-q", "-f", "raw", "long.raw", "6M"});
    qemu_io("long.raw", "raw", {"write -q -P 4 0 6M"});
    for (const std::string base : {"short.raw", "long.raw", "short.raw"}) {
        must_tool({"rebase", "-b", base, "-F", "raw", "disk.qcow2"});
        EXPECT_TRUE(contents("disk.qcow2") == before);
        expect_sound("disk.qcow2");
    }
}

/// What both chains share is neither read nor copied.
TEST_F(RebaseTest, WhatIsTheSameIsNotCopied) {
    qemu_img({"create", "-q", "-f", "qcow2", "-b", "old.qcow2", "-F", "qcow2", "mid.qcow2"});
    qemu_io("mid.qcow2", "qcow2", {"write -q -P 7 2M 64k"});
    qemu_img({"create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"});
    const auto before = contents("top.qcow2");
    must_tool({"rebase", "-b", "old.qcow2", "-F", "qcow2", "top.qcow2"});
    EXPECT_TRUE(contents("top.qcow2") == before);
    const auto map = json::parse(must_tool({"map", "--json", "top.qcow2"}).out);
    std::uint64_t own = 0;
    for (const auto& extent : map)
        if (extent["depth"] == 0 && extent["data"] == true) own += extent["length"].get<std::uint64_t>();
    EXPECT_EQ(own, 65536U);
    // Of equal contents elsewhere, neither.
    qemu_img({"convert", "-f", "qcow2", "-O", "qcow2", "old.qcow2", "copy.qcow2"});
    must_tool({"rebase", "-b", "copy.qcow2", "-F", "qcow2", "top.qcow2"});
    EXPECT_TRUE(contents("top.qcow2") == before);
    EXPECT_EQ(json::parse(must_tool({"info", "--usage", "--json", "top.qcow2"}).out).dump().find("262144"),
              std::string::npos);
}

TEST_F(RebaseTest, UnsafeChangesTheNameAlone) {
    const auto before = bytes_of("disk.qcow2");
    std::filesystem::rename(directory_.file("old.qcow2"), directory_.file("moved.qcow2"));
    expect_refusal({"resize", "disk.qcow2", "6M"}, HasSubstr("qcow rebase -u -b FILE -F FORMAT disk.qcow2"));
    must_tool({"rebase", "-u", "-b", "moved.qcow2", "-F", "qcow2", "disk.qcow2"});
    EXPECT_EQ(info("disk.qcow2")["backing-filename"], "moved.qcow2");
    auto after = bytes_of("disk.qcow2");
    ASSERT_EQ(after.size(), before.size());
    EXPECT_TRUE(after.substr(65536) == before.substr(65536));
    expect_sound("disk.qcow2");
    must_tool({"rebase", "-u", "-b", "/nowhere/a.raw", "-F", "raw", "disk.qcow2"});
    EXPECT_EQ(info("disk.qcow2")["backing-filename"], "/nowhere/a.raw");
    must_tool({"rebase", "-u", "-b", "moved.qcow2", "-F", "qcow2", "disk.qcow2"});
    must_tool({"read", "disk.qcow2", "0", "1"});
}

TEST_F(RebaseTest, RefusesWhatWouldLoseData) {
    const auto before = bytes_of("disk.qcow2");
    qemu_img({"create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "child.qcow2"});
    for (const bool unsafe : {false, true}) {
        const auto refuses = [&](const std::string& base, const std::string& format, const auto& message) {
            Arguments rebase = {"rebase", "-b", base, "disk.qcow2"};
            if (!format.empty()) rebase.insert(rebase.end(), {"-F", format});
            if (unsafe) rebase.emplace_back("-u");
            expect_refusal(rebase, message);
            EXPECT_TRUE(bytes_of("disk.qcow2") == before);
        };
        refuses("disk.qcow2", "qcow2", AllOf(HasSubstr("the image"), HasSubstr("its new backing file")));
        refuses("./child.qcow2", "qcow2", AllOf(HasSubstr("the image"), HasSubstr("its new backing file")));
        refuses("new.raw", "", HasSubstr("-F"));
        if (!unsafe) refuses("absent.raw", "raw", AllOf(HasSubstr("absent.raw"), HasSubstr("-u")));
    }
    expect_refusal({"rebase", "-f", "raw", "-b", "old.qcow2", "-F", "qcow2", "new.raw"},
                   AllOf(HasSubstr("new.raw"), HasSubstr("only a qcow2 image")));
    expect_refusal({"rebase", "-b", std::string(1024, 'n'), "-F", "raw", "-u", "disk.qcow2"}, HasSubstr("1023"));
    expect_refusal({"rebase", "disk.qcow2"}, HasSubstr("--backing"));
    must_tool({"create", "-q", "-o", "data_file=data.raw,data_file_raw=on", "raw-data.qcow2", "4M"});
    expect_refusal({"rebase", "-b", "new.raw", "-F", "raw", "raw-data.qcow2"}, HasSubstr("raw external data file"));
}

/// The new backing file is read as the recorded name says: without a backing file of its own, and by QEMU as well.
TEST_F(RebaseTest, TheNewNameIsReadAsItIsRecorded) {
    const auto before = contents("disk.qcow2");
    qemu_img({"create", "-q", "-f", "qcow2", "-b", "new.raw", "-F", "raw", "middle.qcow2"});
    qemu_io("middle.qcow2", "qcow2", {"write -q -P 7 2M 64k"});
    const auto rebased = tool({"rebase", "-F", "qcow2", "-b",
                               R"(json:{"driver":"qcow2","file":{"driver":"file","filename":")" +
                                   directory_.file("middle.qcow2") + R"("},"backing":null})",
                               "disk.qcow2"});
    EXPECT_EQ(rebased.status, 0);
    EXPECT_THAT(rebased.err, HasSubstr("is left out"));
    EXPECT_TRUE(contents("disk.qcow2") == before);
    must_tool({"rebase", "-b", "file:new.raw", "-F", "raw", "disk.qcow2"});
    EXPECT_EQ(info("disk.qcow2")["backing-filename"], "new.raw");
    EXPECT_TRUE(contents("disk.qcow2") == before);
}

TEST_F(RebaseTest, AnEncryptedBackingFileIsRefused) {
    make_encrypted_image("locked.qcow2", "4M", directory_.path());
    qemu_img({"create", "-q", "-f", "qcow2", "full.qcow2", "1M"});
    qemu_io("full.qcow2", "qcow2", {"write -q -P 1 0 1M"});
    const auto before = bytes_of("full.qcow2");
    expect_refusal({"rebase", "-b", "locked.qcow2", "-F", "qcow2", "full.qcow2"}, HasSubstr("encrypted"));
    EXPECT_TRUE(bytes_of("full.qcow2") == before);
}

TEST_F(RebaseTest, WarnsOfSnapshots) {
    qemu_img({"snapshot", "-c", "before", "disk.qcow2"});
    const auto done = tool({"rebase", "-b", "new.raw", "-F", "raw", "disk.qcow2"});
    EXPECT_EQ(done.status, 0);
    EXPECT_THAT(done.err, HasSubstr("internal snapshots (1)"));
    expect_sound("disk.qcow2");
}

TEST_F(RebaseTest, CanBeCancelledAndRunAgain) {
    const auto before = contents("disk.qcow2");
    std::stop_source stop;
    RebaseJob job;
    job.image.location.path = directory_.file("disk.qcow2");
    job.backing = "new.raw";
    job.backing_format = Format::raw;
    job.workers = 1;
    const auto cancelled =
        rebase(job, {.progress = [&](auto, auto) { stop.request_stop(); }, .stop = stop.get_token()});
    ASSERT_FALSE(cancelled.has_value());
    EXPECT_EQ(cancelled.error().code, Errc::cancelled);
    EXPECT_EQ(info("disk.qcow2")["backing-filename"], "old.qcow2");
    EXPECT_TRUE(contents("disk.qcow2") == before);
    std::uint64_t last = 0;
    const auto done = rebase(job, {.progress = [&](auto bytes, auto) { last = bytes; }});
    ASSERT_TRUE(done.has_value()) << done.error().message();
    EXPECT_EQ(done->bytes, 5U << 20);
    EXPECT_EQ(last, 5U << 20);
    EXPECT_GT(done->copied_bytes, 0U);
    EXPECT_TRUE(contents("disk.qcow2") == before);
}

/// What the guest sees stays, so nobody has to mark them: a process that dies costs no bitmap.
TEST_F(RebaseTest, BitmapsAreNotMarked) {
    const auto bitmap = [&] {
        const auto shown = qemu_img_json({"info", "-U", "--output=json", "disk.qcow2"}, directory_.path());
        return shown["format-specific"]["data"]["bitmaps"][0];
    };
    const auto dirty_bytes = [&] {
        const auto opened = value_of(open_image({.location = {.path = directory_.file("disk.qcow2")}}));
        std::uint64_t bytes = 0;
        value_of(opened->each_dirty("changes", {0}, opened->size(), [&](const DirtyRun& run) -> Result<void> {
            if (run.dirty) bytes += run.length;
            return {};
        }));
        return bytes;
    };
    for (const auto& [backing, compress] : std::vector<std::pair<std::string, bool>>{{"new.raw", true}, {"", false}}) {
        make_overlay("disk.qcow2", {});
        must_tool({"bitmap", "--add", "disk.qcow2", "changes"});
        qemu_io("disk.qcow2", "qcow2", {"write -q -P 7 2M 1k"});
        const auto before = bitmap();
        ASSERT_EQ(before["flags"], json::array({"auto"}));
        RebaseJob job;
        job.image.location.path = directory_.file("disk.qcow2");
        job.backing = backing;
        job.backing_format = Format::raw;
        job.compress = compress;
        std::vector<json> meanwhile;
        const auto done = rebase(job, {.progress = [&](auto, auto) { meanwhile.push_back(bitmap()); }});
        ASSERT_TRUE(done.has_value()) << done.error().message();
        EXPECT_GT(done->copied_bytes, 0U);
        EXPECT_GT(meanwhile.size(), 1U);
        for (const auto& seen : meanwhile) EXPECT_EQ(seen, before);
        EXPECT_EQ(bitmap(), before);
        EXPECT_EQ(dirty_bytes(), 64U << 10);
        expect_sound("disk.qcow2");
    }
}

/// QEMU makes such a chain when it is asked to.
TEST_F(RebaseTest, ALoopCanBeBroken) {
    qemu_img({"rebase", "-u", "-b", "disk.qcow2", "-F", "qcow2", "old.qcow2"});
    for (const auto& command : {Arguments{"commit", "disk.qcow2"}, Arguments{"snapshot", "-c", "s", "disk.qcow2"},
                                Arguments{"resize", "disk.qcow2", "8M"}})
        expect_refusal(command, AllOf(HasSubstr("is a loop"), HasSubstr("qcow rebase -u")));
    EXPECT_EQ(tool({"check", "disk.qcow2"}).status, 1);
    EXPECT_EQ(tool({"check", "-r", "all", "disk.qcow2"}).status, 1);
    expect_refusal({"rebase", "-u", "-b", "disk.qcow2", "-F", "qcow2", "disk.qcow2"}, HasSubstr("would overwrite"));
    must_tool({"rebase", "-u", "-b", "", "old.qcow2"});
    EXPECT_EQ(contents("disk.qcow2").size(), 5U << 20);
    expect_sound("disk.qcow2");
}

}  // namespace
}  // namespace qcow::test
