// Where results go: what is never overwritten, what is replaced and how, what is left when something goes wrong.

#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/xattr.h>

#include <csignal>
#include <thread>

#include "support/effort.h"
#include "support/loop_device.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;

/// base.qcow2 <- middle.qcow2 <- top.qcow2, and with-data.qcow2 with its data file; a raw disk.
class TargetsTest : public ToolTest {
protected:
    void SetUp() override {
        ToolTest::SetUp();
        const auto make = [&](const Arguments& arguments) {
            Arguments command = {"create", "-q", "-f", "qcow2"};
            command.insert(command.end(), arguments.begin(), arguments.end());
            must_qemu_img(command, directory_.path());
        };
        make({"-b", "top.qcow2", "-F", "qcow2", "leaf.qcow2"});
        make({"-o", "data_file=data.raw", "with-data.qcow2", "1M"});
        make({"-b", "with-data.qcow2", "-F", "qcow2", "over-data.qcow2"});
        put_file(directory_.file("disk.raw"), std::string(1 << 20, 'p'));
    }

    /// Everything in the directory, by name.
    [[nodiscard]] std::map<std::string, std::string> everything() const {
        std::map<std::string, std::string> result;
        for (const auto& name : files()) {
            if (std::filesystem::is_regular_file(directory_.file(name))) result[name] = bytes_of(name);
        }
        return result;
    }

    void expect_nothing_touched(const Arguments& arguments, const testing::Matcher<std::string>& message) const {
        const auto before = everything();
        expect_refusal(arguments, message);
        EXPECT_TRUE(everything() == before) << tool(arguments).text();
    }

    /// The ways to write the name of a file: a path, "file:" and descriptions.
    [[nodiscard]] std::vector<std::string> spellings(const std::string& name) const {
        const auto absolute = directory_.file(name);
        return {"./" + name,
                absolute,
                "file:" + name,
                "file:" + absolute,
                R"(json:{"driver":"file","filename":")" + name + R"("})",
                R"(json:{"driver":"qcow2","file":{"driver":"file","filename":")" + absolute + R"("}})",
                R"(json:{'file.filename':')" + name + R"('})"};
    }

    /// As the value of an option behind -o, which ends at a comma.
    [[nodiscard]] static std::string as_value(std::string name) {
        for (std::size_t at = 0; (at = name.find(',', at)) != std::string::npos; at += 2) name.insert(at, 1, ',');
        return name;
    }

    /// Runs a line of shell script in the directory, in which "qcow" is the tool.
    [[nodiscard]] Finished shell(const std::string& line) const {
        return run({"sh", "-c", std::string("qcow() { ") + QCOW_TOOL + " \"$@\"; }; " + line}, directory_.path());
    }
};

// ---- What is in use ----

TEST_F(TargetsTest, CreateDoesNotOverwriteTheChain) {
    const auto own = AllOf(HasSubstr("base.qcow2"), HasSubstr("the new image would overwrite its backing file"));
    expect_nothing_touched({"create", "-b", "base.qcow2", "-F", "qcow2", "base.qcow2"}, own);
    expect_nothing_touched({"create", "-b", "./base.qcow2", "-F", "qcow2", "base.qcow2"}, own);
    expect_nothing_touched({"create", "-b", directory_.file("base.qcow2"), "-F", "qcow2", "base.qcow2"}, own);
    expect_nothing_touched({"create", "-o", "backing_file=base.qcow2,backing_fmt=qcow2", "base.qcow2"}, own);
    expect_nothing_touched({"create", "-b", "top.qcow2", "-F", "qcow2", "base.qcow2"},
                           HasSubstr("the new image would overwrite the backing file of its backing file"));
    expect_nothing_touched({"create", "-b", "leaf.qcow2", "-F", "qcow2", "base.qcow2"},
                           HasSubstr("the new image would overwrite a backing file of its backing file"));
    expect_nothing_touched({"create", "-b", "over-data.qcow2", "-F", "qcow2", "data.raw"},
                           HasSubstr("overwrite the data file of the backing file of its backing file"));
    expect_nothing_touched({"create", "-b", "disk.raw", "-F", "raw", "disk.raw"}, HasSubstr("its backing file"));
    expect_nothing_touched({"create", "-f", "raw", "-b", "disk.raw", "-F", "raw", "disk.raw"}, HasSubstr("raw"));
    for (const std::string link : {"symbolic", "hard"}) {
        if (link == "hard") {
            std::filesystem::create_hard_link(directory_.file("base.qcow2"), directory_.file(link));
        } else {
            std::filesystem::create_symlink("base.qcow2", directory_.file(link));
        }
        expect_nothing_touched({"create", "-b", "top.qcow2", "-F", "qcow2", link},
                               AllOf(HasSubstr(link), HasSubstr("would overwrite"), HasSubstr("\"base.qcow2\"")));
        expect_nothing_touched({"create", "-b", link, "-F", "qcow2", "base.qcow2"}, HasSubstr("would overwrite"));
    }
}

TEST_F(TargetsTest, CreateDoesNotOverwriteAChainThatItNeedNotOpen) {
    for (const std::string backing : {"base.qcow2", "./base.qcow2", "top.qcow2", "leaf.qcow2"}) {
        expect_nothing_touched({"create", "-u", "-b", backing, "-F", "qcow2", "base.qcow2", "4M"},
                               HasSubstr("would overwrite"));
    }
    // As far as it can be followed.
    std::filesystem::rename(directory_.file("base.qcow2"), directory_.file("away"));
    put_file(directory_.file("base.qcow2"), "no image at all");
    expect_nothing_touched({"create", "-u", "-b", "leaf.qcow2", "-F", "qcow2", "base.qcow2", "4M"},
                           HasSubstr("a backing file of its backing file"));
    must_tool({"create", "-u", "-q", "-b", "absent", "-F", "qcow2", "new.qcow2", "4M"});
}

TEST_F(TargetsTest, NamesOfEveryKindLeadToTheSameFile) {
    const auto refused = HasSubstr("would overwrite");
    for (const auto& base : fewer(spellings("base.qcow2"))) {
        SCOPED_TRACE(base);
        expect_nothing_touched({"create", "-b", base, "-F", "qcow2", "base.qcow2"}, refused);
        expect_nothing_touched({"create", "-u", "-b", base, "-F", "qcow2", "base.qcow2", "4M"}, refused);
        expect_nothing_touched({"create", "-o", "backing_fmt=qcow2,backing_file=" + as_value(base), base}, refused);
        expect_nothing_touched({"create", "-b", "top.qcow2", "-F", "qcow2", base}, refused);
        expect_nothing_touched({"create", "-u", "-b", "file:top.qcow2", "-F", "qcow2", base, "4M"}, refused);
        const auto data = "data_file=" + as_value(base);
        expect_nothing_touched({"create", "-o", data, "-b", "top.qcow2", "-F", "qcow2", "new.qcow2"}, refused);
        expect_nothing_touched({"create", "-o", data, "base.qcow2", "1M"}, refused);
        expect_nothing_touched({"convert", "-O", "qcow2", "-o", data, "top.qcow2", "new.qcow2"}, refused);
        expect_nothing_touched({"convert", "file:top.qcow2", base}, refused);
        expect_nothing_touched({"convert", base, "base.qcow2"}, refused);
        expect_nothing_touched({"convert", "-n", "file:top.qcow2", base}, refused);
        expect_nothing_touched({"convert", "-O", "qcow2", "-B", base, "-F", "qcow2", "disk.raw", "base.qcow2"},
                               refused);
        expect_nothing_touched({"convert", "-O", "qcow2", "-B", "file:top.qcow2", "-F", "qcow2", "disk.raw", base},
                               refused);
    }
}

TEST_F(TargetsTest, WhatAnImageNamesIsItsOwnAlthoughSomethingElseIsRead) {
    must_tool({"convert", "-O", "qcow2", "base.qcow2", "moved.qcow2"});
    for (const std::string other : {"--backing=moved.qcow2", "--no-backing"}) {
        const auto refused = [&](const std::string& command, const std::string& message) {
            const auto before = everything();
            const auto finished = shell("qcow " + command);
            EXPECT_EQ(finished.status, 1) << finished.text();
            EXPECT_THAT(finished.err, HasSubstr("would overwrite " + message)) << command;
            EXPECT_TRUE(everything() == before) << command;
        };
        refused("convert " + other + " top.qcow2 base.qcow2", "the backing file of the source");
        refused("convert -n " + other + " top.qcow2 file:base.qcow2", "the backing file of the source");
        refused("convert " + other + " leaf.qcow2 base.qcow2", "a backing file of the source");
        refused("convert " + other + " over-data.qcow2 data.raw", "the data file of the backing file of the source");
        refused("convert " + other + " top.qcow2 - >> base.qcow2", "the backing file of the source");
        refused("read " + other + " top.qcow2 0 1 >> base.qcow2", "the backing file of the image");
        refused("serve -r " + other + " --pid-file base.qcow2 --socket socket top.qcow2",
                "the backing file of the image");
    }
    expect_nothing_touched({"convert", "--backing", "moved.qcow2", "top.qcow2", "moved.qcow2"},
                           HasSubstr("the target would overwrite the backing file of the source"));
}

TEST_F(TargetsTest, DataFilesAreNotOtherFiles) {
    expect_nothing_touched({"create", "-o", "data_file=base.qcow2", "-b", "base.qcow2", "-F", "qcow2", "new.qcow2"},
                           HasSubstr("the data file of the new image would overwrite its backing file"));
    expect_nothing_touched({"create", "-o", "data_file=new.qcow2", "new.qcow2", "1M"},
                           HasSubstr("the data file of the new image would overwrite the new image"));
    expect_nothing_touched({"convert", "-O", "qcow2", "-o", "data_file=disk.raw", "disk.raw", "new.qcow2"},
                           HasSubstr("the data file of the target would overwrite the source"));
    expect_nothing_touched({"convert", "-O", "qcow2", "-o", "data_file=./base.qcow2", "top.qcow2", "new.qcow2"},
                           HasSubstr("the data file of the target would overwrite the backing file of the source"));
    expect_nothing_touched({"convert", "-O", "qcow2", "-o", "data_file=new.qcow2", "disk.raw", "new.qcow2"},
                           HasSubstr("the data file of the target would overwrite the target"));
}

TEST_F(TargetsTest, DataFilesThatHoldSomethingAreNotEmptied) {
    const auto message = AllOf(HasSubstr("disk.raw"), HasSubstr("not empty"), HasSubstr("remove it"));
    expect_nothing_touched({"create", "-o", "data_file=disk.raw", "new.qcow2", "1M"}, message);
    expect_nothing_touched({"convert", "-O", "qcow2", "-o", "data_file=disk.raw", "top.qcow2", "new.qcow2"}, message);
    put_file(directory_.file("empty.raw"), "");
    must_tool({"create", "-q", "-o", "data_file=empty.raw", "new.qcow2", "1M"});
    must_qemu_img({"check", "-q", "new.qcow2"}, directory_.path());
}

/// Of two files that are made, the second finds no room for its name.
TEST_F(TargetsTest, ADataFileThatStaysIsTold) {
    for (const Arguments& command :
         {Arguments{"create", "-o", "data_file=new.raw", "new.qcow2", "1M"},
          Arguments{"convert", "-O", "qcow2", "-o", "data_file=new.raw", "top.qcow2", "new.qcow2"}}) {
        Arguments traced = {"env", "ASAN_OPTIONS=detect_leaks=0",       "strace", "-f", "-o", "trace",
                            "-e",  "inject=linkat:error=ENOSPC:when=2", QCOW_TOOL};
        traced.insert(traced.end(), command.begin(), command.end());
        const auto finished = run(traced, directory_.path());
        EXPECT_EQ(finished.status, 1) << finished.text();
        EXPECT_THAT(finished.err, AllOf(HasSubstr("new.qcow2"), HasSubstr("No space"),
                                        HasSubstr("its data file new.raw was made and stays")));
        EXPECT_FALSE(files().contains("new.qcow2"));
        EXPECT_TRUE(std::filesystem::remove(directory_.file("new.raw")));
    }
}

TEST_F(TargetsTest, ConvertDoesNotOverwriteWhatItReads) {
    // Without locks, which would notice some of it, too.
    for (const Arguments& unlocked : {Arguments{"convert"}, Arguments{"convert", "-U"}}) {
        const auto refused = [&](const Arguments& arguments, const std::string& message) {
            auto all = unlocked;
            all.insert(all.end(), arguments.begin(), arguments.end());
            expect_nothing_touched(all, HasSubstr(message));
        };
        refused({"base.qcow2", "base.qcow2"}, "the target would overwrite the source");
        refused({"top.qcow2", "base.qcow2"}, "the target would overwrite the backing file of the source");
        refused({"leaf.qcow2", "./base.qcow2"}, "the target would overwrite a backing file of the source");
        refused({"over-data.qcow2", "data.raw"}, "overwrite the data file of the backing file of the source");
        refused({"disk.raw", "top.qcow2", "base.qcow2"}, "the target would overwrite the backing file of source 2");
        refused({"-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "disk.raw", "base.qcow2"},
                "the target would overwrite its backing file");
        refused({"-O", "qcow2", "-B", "top.qcow2", "-F", "qcow2", "disk.raw", "base.qcow2"},
                "the target would overwrite the backing file of its backing file");
        refused({"-n", "top.qcow2", "base.qcow2"}, "the target would overwrite the backing file of the source");
        refused({"-n", "disk.raw", "disk.raw"}, "the target would overwrite the source");
        refused({"-n", "data.raw", "with-data.qcow2"}, "the data file of the target would overwrite the source");
        refused({"-n", "over-data.qcow2", "with-data.qcow2"}, "overwrite the backing file of the source");
    }
    must_tool({"convert", "-n", "base.qcow2", "top.qcow2"});  // into what stands on the source
}

TEST_F(TargetsTest, StandardInputAndOutputAreFilesToo) {
    for (const std::string line :
         {"qcow convert -U top.qcow2 - >> base.qcow2", "qcow read -U top.qcow2 0 4M >> base.qcow2",
          "qcow write base.qcow2 0 < base.qcow2"}) {
        const auto before = everything();
        const auto finished = shell(line);
        EXPECT_EQ(finished.status, 1) << finished.text();
        EXPECT_THAT(finished.err, HasSubstr("would overwrite")) << line;
        EXPECT_TRUE(everything() == before) << line;
    }
}

TEST_F(TargetsTest, TheProcessNumberDoesNotOverwriteTheImage) {
    expect_nothing_touched({"serve", "--pid-file", "base.qcow2", "--socket", "socket", "top.qcow2"},
                           HasSubstr("would overwrite the backing file of the image"));
}

// ---- Pipes ----

TEST_F(TargetsTest, RawDataGoIntoPipes) {
    for (const std::string target : {"-", "/dev/stdout", "/dev/fd/1"}) {
        const auto finished = must_tool({"convert", "top.qcow2", target});
        must_tool({"convert", "top.qcow2", "top.raw"});
        EXPECT_TRUE(finished.out == bytes_of("top.raw")) << target << ": " << finished.out.size() << " bytes";
    }
    EXPECT_EQ(shell("printf before > out; qcow convert top.qcow2 /dev/stdout >> out").status, 0);
    EXPECT_TRUE(bytes_of("out") == "before" + bytes_of("top.raw"));
    EXPECT_EQ(shell("mkfifo pipe; cat pipe > out & qcow convert top.qcow2 pipe && wait").status, 0);
    EXPECT_TRUE(bytes_of("out") == bytes_of("top.raw"));
    EXPECT_EQ(shell("qcow convert top.qcow2 - > /dev/full").status, 1);
    EXPECT_EQ(files().count("-"), 0U);
}

TEST_F(TargetsTest, ImagesDoNotGoIntoPipes) {
    for (const std::string target : {"-", "/dev/stdout"}) {
        expect_nothing_touched({"convert", "-O", "qcow2", "top.qcow2", target}, HasSubstr("cat FILE"));
        expect_nothing_touched({"convert", "-n", "top.qcow2", target}, HasSubstr("cat FILE"));
        expect_nothing_touched({"convert", "-n", "top.qcow2", target}, HasSubstr("raw data only"));
    }
    expect_nothing_touched({"create", "-", "1M"}, HasSubstr("./-"));
    expect_nothing_touched({"create", "-o", "data_file=-", "new.qcow2", "1M"}, HasSubstr("./-"));
    expect_nothing_touched({"create", "/dev/stdout", "1M"}, HasSubstr("pipe"));
    expect_nothing_touched({"serve", "--pid-file", "-", "--socket", "socket", "base.qcow2"}, HasSubstr("./-"));
}

TEST_F(TargetsTest, ImagesDoNotComeFromPipes) {
    for (const std::string command : {"info", "check", "map"})
        expect_nothing_touched({command, "-"}, HasSubstr("standard input"));
    expect_nothing_touched({"convert", "-", "new.raw"}, HasSubstr("cat > FILE"));
    expect_nothing_touched({"resize", "-", "1M"}, HasSubstr("standard input"));
    const auto piped = shell("cat disk.raw | qcow convert /dev/stdin new.raw");
    EXPECT_EQ(piped.status, 1);
    EXPECT_THAT(piped.err, HasSubstr("into a file"));
    EXPECT_EQ(shell("qcow convert -f raw /dev/stdin new.raw < disk.raw && cmp disk.raw new.raw").status, 0);
}

// ---- What is replaced, and what is written in place ----

TEST_F(TargetsTest, WhatReplacesAFileIsAsThatWas) {
    for (const Arguments& command :
         {Arguments{"convert", "-O", "qcow2", "top.qcow2", "old"}, Arguments{"convert", "top.qcow2", "old"},
          Arguments{"create", "-q", "old", "1M"}}) {
        put_file(directory_.file("old"), "old");
        ASSERT_EQ(chmod(directory_.file("old").c_str(), 0604), 0);
        if (geteuid() == 0) {
            ASSERT_EQ(chown(directory_.file("old").c_str(), 12345, 12346), 0);
        }
        must_tool(command);
        struct stat status = {};
        ASSERT_EQ(stat(directory_.file("old").c_str(), &status), 0);
        EXPECT_EQ(status.st_mode & 07777, 0604U);
        if (geteuid() != 0) continue;
        EXPECT_EQ(status.st_uid, 12345U);
        EXPECT_EQ(status.st_gid, 12346U);
    }
}

TEST_F(TargetsTest, AMountPointIsWrittenInPlace) {
    if (geteuid() != 0) GTEST_SKIP() << "only root mounts";
    const auto target = directory_.file("target");
    put_file(target, std::string(8 << 20, 'o'));
    if (mount(target.c_str(), target.c_str(), nullptr, MS_BIND, nullptr) != 0) GTEST_SKIP() << "no mounts here";
    const auto warned = AllOf(HasSubstr("warning: "), HasSubstr("target"), HasSubstr("mount point"));

    expect_refusal({"convert", "target", "target"}, HasSubstr("overwrite"));
    auto finished = tool({"convert", "-O", "qcow2", "-o", "cluster_size=3", "top.qcow2", "target"});
    EXPECT_EQ(finished.status, 1);
    EXPECT_THAT(finished.err, testing::Not(HasSubstr("incomplete")));
    EXPECT_TRUE(bytes_of("target") == std::string(8 << 20, 'o')) << "touched although the options were wrong";

    for (const std::string format : {"qcow2", "raw"}) {
        finished = tool({"convert", "-O", format, "top.qcow2", "target"});
        EXPECT_EQ(finished.status, 0) << finished.text();
        EXPECT_THAT(finished.err, warned);
        must_qemu_img({"compare", "-q", "-F", format, "top.qcow2", "target"}, directory_.path());
        finished = tool({"create", "-q", "-f", format, "target", "2M"});
        EXPECT_EQ(finished.status, 0) << finished.text();
        EXPECT_THAT(finished.err, warned);
        EXPECT_THAT(must_qemu_img({"map", "-f", format, "target"}, directory_.path()).out,
                    testing::Not(HasSubstr("0x")));
    }
    corrupt_l2_entry();
    finished = tool({"convert", "top.qcow2", "target"});
    EXPECT_EQ(finished.status, 1) << finished.text();
    EXPECT_THAT(finished.err, AllOf(HasSubstr("L2 entry"), HasSubstr("target was written in place and is incomplete")));
    umount(target.c_str());
}

// ---- Signals ----

/// A directory in which a conversion takes as long as anybody could want.
class KilledTest : public TargetsTest {
protected:
    void SetUp() override {
        TargetsTest::SetUp();
        // With a hole: what lies in one piece may be copied in one, and nothing be said meanwhile.
        put_file(directory_.file("large.raw"), Random(1).bytes(64 << 10));
        must_run({"truncate", "-s", "128k", "large.raw"}, directory_.path());
        std::ofstream(directory_.file("large.raw"), std::ios::in | std::ios::ate) << Random(2).bytes(6 << 20);
    }

    /// Begins to convert to `target`, ends it with the signal in the middle of that, and gives what was said.
    [[nodiscard]] Finished kill_conversion(const Arguments& before, const std::string& target, int signal,
                                           const Arguments& options = {"-O", "qcow2", "-o",
                                                                       "compression_type=zstd"}) const {
        auto arguments = before;
        for (const auto* word : {QCOW_TOOL, "convert", "-p", "-m", "1", "-c", "--level", "19"})
            arguments.emplace_back(word);
        arguments.insert(arguments.end(), options.begin(), options.end());
        arguments.emplace_back("large.raw");
        arguments.push_back(target);
        Subprocess process(arguments, directory_.path());
        process.wait_for("converting: 10%");
        process.signal(signal);
        return process.finish();
    }
};

TEST_F(KilledTest, ConvertLeavesNothingBehind) {
    const auto before = files();
    for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
        EXPECT_EQ(kill_conversion({}, "target", signal).status, 128 + signal);
        EXPECT_EQ(files(), before);
    }
}

TEST_F(KilledTest, ConvertLeavesNothingBehindWhereThereAreNoUnnamedFiles) {
    auto before = files();
    before.insert("trace");
    const Arguments traced = {
        "env", "ASAN_OPTIONS=detect_leaks=0",   "strace", "-D", "-f", "-o", "trace", "-P", directory_.path(),
        "-e",  "inject=openat:error=EOPNOTSUPP"};
    EXPECT_EQ(kill_conversion(traced, directory_.file("target"), SIGTERM).status, 128 + SIGTERM);
    EXPECT_EQ(files(), before);
}

TEST_F(KilledTest, ASignalThatIsIgnoredStaysSo) {
    const auto finished = kill_conversion({"nohup"}, "target", SIGHUP);
    EXPECT_EQ(finished.status, 0) << finished.text();
    must_qemu_img({"compare", "-q", "-f", "raw", "large.raw", "target"}, directory_.path());
}

TEST_F(KilledTest, ATargetInPlaceIsSaidToBeIncomplete) {
    if (geteuid() != 0) GTEST_SKIP() << "only root mounts";
    const auto target = directory_.file("target");
    put_file(target, "old");
    if (mount(target.c_str(), target.c_str(), nullptr, MS_BIND, nullptr) != 0) GTEST_SKIP() << "no mounts here";
    const auto finished = kill_conversion({}, "target", SIGINT);
    EXPECT_EQ(finished.status, 128 + SIGINT);
    EXPECT_THAT(finished.err, HasSubstr("target: was written in place and is incomplete"));
    EXPECT_EQ(qemu_img({"info", "-f", "qcow2", "target"}, directory_.path()).status, 1) << "half an image";
    umount(target.c_str());
}

TEST_F(KilledTest, AnImageThatWasThereIsClosedInOrderAndHoldsAPart) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", "target", "8M"}, directory_.path());
    must_qemu_img({"bitmap", "--add", "target", "written"}, directory_.path());
    const auto finished = kill_conversion({}, "target", SIGTERM, {"-n"});
    EXPECT_EQ(finished.status, 128 + SIGTERM);
    EXPECT_THAT(finished.err, HasSubstr("target holds only a part of the source"));
    must_qemu_img({"check", "-q", "target"}, directory_.path());
    const auto info = qemu_img_json({"info", "--output=json", "target"}, directory_.path());
    EXPECT_EQ(info["format-specific"]["data"]["bitmaps"][0]["flags"], nlohmann::json::array({"auto"}))
        << "nobody may believe a bitmap that is in use";
}

TEST_F(TargetsTest, ALimitOnFileSizesIsAnError) {
    const auto before = files();
    for (const std::string command : {"qcow convert base.qcow2 new.raw", "qcow convert -O qcow2 disk.raw new.qcow2",
                                      "qcow create -o preallocation=full new.qcow2 4M"}) {
        const auto finished = shell("ulimit -f 512; " + command);
        EXPECT_EQ(finished.status, 1) << finished.text();
        EXPECT_THAT(finished.err, AllOf(HasSubstr("qcow: new."), HasSubstr("File too large")));
    }
    EXPECT_EQ(files(), before);
}

// ---- Block devices ----

class DeviceTest : public TargetsTest {
protected:
    void SetUp() override {
        if (!device_.obstacle().empty()) GTEST_SKIP() << device_.obstacle();
        TargetsTest::SetUp();
        must_qemu_img({"create", "-q", "-f", "qcow2", "disk.qcow2", "5000192"}, directory_.path());
        must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 1 100k 70k", "write -q -P 2 3M 1M", "write -q -P 3 4874k 9k"},
                     directory_.path());
    }

    /// Old contents everywhere.
    void soil() const { put_file(device_.path(), std::string(device_bytes, '\xa5')); }

    void expect_copy(const std::string& what) const {
        const auto checked = qemu_img({"check", "-f", "qcow2", device_.path()});
        EXPECT_EQ(checked.status, 0) << what << ": " << checked.text();
        EXPECT_EQ(
            qemu_img({"compare", "-f", "qcow2", "-F", "qcow2", directory_.file("disk.qcow2"), device_.path()}).status,
            0)
            << what;
    }

    static constexpr std::size_t device_bytes = 16 << 20;
    LoopDevice device_{device_bytes};
};

TEST_F(DeviceTest, HoldsAnImage) {
    for (const std::string options : {"compat=1.1", "cluster_size=512", "compat=0.10", "extended_l2=on"}) {
        soil();
        must_tool({"convert", "-O", "qcow2", "-o", options, "disk.qcow2", device_.path()});
        expect_copy("converted with " + options);
    }
    soil();
    must_tool({"convert", "-O", "qcow2", "-c", "disk.qcow2", device_.path()});
    expect_copy("compressed");
    soil();
    // Zeros that hide a backing file are clusters of zeros in version 2.
    must_tool({"convert", "-O", "qcow2", "-o", "compat=0.10", "-B", directory_.file("base.qcow2"), "-F", "qcow2",
               "disk.qcow2", device_.path()});
    expect_copy("over a backing file");
}

TEST_F(DeviceTest, HoldsANewImage) {
    for (const std::string options : {"refcount_bits=16", "preallocation=metadata", "preallocation=falloc",
                                      "preallocation=full", "compat=0.10,preallocation=metadata"}) {
        soil();
        must_tool({"create", "-q", "-o", options, device_.path(), "5000192"});
        EXPECT_EQ(must_tool({"read", device_.path(), "0", "5000192"}).out, std::string(5000192, '\0')) << options;
        must_tool({"convert", "-n", "disk.qcow2", device_.path()});
        expect_copy(options);
    }
    soil();
    must_tool({"create", "-q", "-f", "raw", device_.path(), "5000192"});
    EXPECT_EQ(file_bytes(device_.path()).substr(0, 5000192), std::string(5000192, '\0'));
}

TEST_F(DeviceTest, HoldsTheDataOfAnImage) {
    soil();
    must_tool(
        {"convert", "-O", "qcow2", "-o", "data_file_raw=on,data_file=" + device_.path(), "disk.qcow2", "new.qcow2"});
    must_qemu_img({"compare", "-q", "disk.qcow2", "new.qcow2"}, directory_.path());
    must_tool({"convert", "disk.qcow2", "expected.raw"});
    EXPECT_TRUE(file_bytes(device_.path()).substr(0, 5000192) == bytes_of("expected.raw"));
    soil();
    must_tool({"create", "-q", "-o", "preallocation=metadata,data_file=" + device_.path(), "new.qcow2", "5000192"});
    EXPECT_EQ(must_tool({"read", "new.qcow2", "0", "5000192"}).out, std::string(5000192, '\0'));
}

TEST_F(DeviceTest, ThatIsTooSmallIsAnError) {
    soil();
    const auto message = AllOf(HasSubstr(device_.path()), HasSubstr("the device has 16777216 bytes"));
    expect_refusal({"create", "-q", "-o", "preallocation=metadata", device_.path(), "17M"}, message);
    must_qemu_img({"create", "-q", "-f", "qcow2", "larger.qcow2", "17M"}, directory_.path());
    expect_refusal({"convert", "larger.qcow2", device_.path()}, message);
    EXPECT_TRUE(file_bytes(device_.path()) == std::string(device_bytes, '\xa5')) << "known before it is changed";
    must_qemu_io("larger.qcow2", "qcow2", {"write -q -P 1 0 17M"}, directory_.path());
    expect_refusal({"convert", "-O", "qcow2", "larger.qcow2", device_.path()}, AllOf(message, HasSubstr("incomplete")));
    EXPECT_EQ(qemu_img({"info", "-f", "qcow2", device_.path()}).status, 1) << "half an image";
    must_tool({"convert", "-O", "qcow2", "-c", "larger.qcow2", device_.path()});
}

TEST_F(DeviceTest, IsNotOverwrittenWhileItIsRead) {
    must_tool({"convert", "-O", "qcow2", "disk.qcow2", device_.path()});
    const auto before = file_bytes(device_.path());
    std::filesystem::create_symlink(device_.path(), directory_.file("link"));
    expect_refusal({"convert", "-O", "qcow2", device_.path(), "link"}, HasSubstr("would overwrite the source"));
    expect_refusal({"create", "-b", directory_.file("link"), "-F", "qcow2", device_.path()},
                   HasSubstr("would overwrite its backing"));
    EXPECT_TRUE(file_bytes(device_.path()) == before);
}

}  // namespace
}  // namespace qcow::test
