// qcow put, rm and mkdir. Programs of the file systems judge the result.

#include <fmt/format.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "tool/inside_fixture.h"

namespace qcow::test {
namespace {

using testing::HasSubstr;

class PutTest : public InsideTest {};

TEST_F(PutTest, ChangesExtInPlace) {
    make_tree();
    for (const auto* const kind :
         {"-t ext4 -I 256", "-t ext2 -b 1024 -I 256", "-t ext4 -b 4096 -O metadata_csum,64bit -I 256"}) {
        shell("truncate -s 64M disk.raw; mke2fs -q -F " + std::string(kind) + " disk.raw");
        must_qemu_img({"convert", "-O", "qcow2", "disk.raw", "disk.qcow2"}, directory_.path());
        must_tool({"mkdir", "-p", "disk.qcow2", "/deep/er"});
        must_tool({"put", "disk.qcow2", "tree", "/deep/er"});
        must_tool({"put", "disk.qcow2", "tree/a/big", "/deep/er/tree/a/f"});  // replaces it
        must_tool({"put", "disk.qcow2", "tree/a/f", "/deep/er/tree/a/f"});
        must_tool({"get", "disk.qcow2", "/deep/er/tree", "out"});
        // Hard links become files, and directories get the time of the change.
        EXPECT_EQ(differences({"-O", "--modify-window=-1"}), "") << kind;  // to the nanosecond
        must_qemu_img({"convert", "-O", "raw", "disk.qcow2", "after.raw"}, directory_.path());
        expect_sound("after.raw");
        must_tool({"rm", "-r", "disk.qcow2", "/deep"});
        must_qemu_img({"convert", "-O", "raw", "disk.qcow2", "after.raw"}, directory_.path());
        expect_sound("after.raw");
        EXPECT_EQ(must_tool({"ls", "disk.qcow2"}).out, "lost+found\n");
        shell("rm -r out");
    }
    expect_refusal({"rm", "disk.qcow2", "/lost+found/x"}, HasSubstr("there is no such file"));
    expect_refusal({"put", "disk.qcow2", "tree/a/f", "/no/where"}, HasSubstr("there is no such file"));
    shell("head -c 80M /dev/zero | tr '\\0' x > large");
    expect_refusal({"put", "disk.qcow2", "large", "/"}, HasSubstr("large"));
    must_qemu_img({"convert", "-O", "raw", "disk.qcow2", "after.raw"}, directory_.path());
    expect_sound("after.raw");
}

TEST_F(PutTest, ChangesNothingThatIsInUseOrNotUnderstood) {
    shell("echo new > new");
    const auto refused = [&](const std::string& message) {
        const auto before = read_file(directory_ / "disk.raw");
        for (const Arguments& command : {Arguments{"put", "-f", "raw", "disk.raw", "new", "/"},
                                         {"mkdir", "-f", "raw", "disk.raw", "/d"},
                                         {"rm", "-f", "raw", "disk.raw", "/lost+found"}})
            expect_refusal(command, HasSubstr(message));
        EXPECT_TRUE(read_file(directory_ / "disk.raw") == before);
    };
    shell("mke2fs -q -F -t ext2 disk.raw 4M; debugfs -w -R 'ssv state 0' disk.raw 2>/dev/null");
    refused("it is mounted, or was not unmounted");
    for (const auto* const feature : {"quota", "ea_inode"}) {
        shell(std::string("rm disk.raw; mke2fs -q -F -t ext4 -O ") + feature + " disk.raw 8M");
        refused(fmt::format("the feature \"{}\"", feature));
    }
}

TEST_F(PutTest, PutKeepsTheOldFileUntilTheNewOneIsComplete) {
    for (const auto* const options : {"-t ext4 -I 256", "-t ext4 -O inline_data -I 256", "-t ext2 -O ^filetype"}) {
        shell(std::string("rm -f disk.raw; mke2fs -q -F ") + options +
              " disk.raw 8M; echo old > value; head -c 20M /dev/urandom > large; ln -sf value link");
        must_tool({"put", "-f", "raw", "disk.raw", "value", "/value"});
        expect_refusal({"put", "-f", "raw", "disk.raw", "large", "/value"}, HasSubstr("large"));
        EXPECT_EQ(must_tool({"cat", "-f", "raw", "disk.raw", "/value"}).out, "old\n");
        EXPECT_EQ(must_tool({"ls", "-f", "raw", "disk.raw"}).out, "lost+found\nvalue\n");
        shell("head -c 1M /dev/urandom > value");
        must_tool({"put", "-f", "raw", "disk.raw", "value", "/value"});
        EXPECT_TRUE(must_tool({"cat", "-f", "raw", "disk.raw", "/value"}).out == read_file(directory_ / "value"));
        expect_sound("disk.raw");
        must_tool({"put", "-f", "raw", "disk.raw", "link", "/value"});
        EXPECT_THAT(must_tool({"ls", "-l", "-f", "raw", "disk.raw", "/"}).out, HasSubstr("value -> value"));
        EXPECT_EQ(must_tool({"ls", "-f", "raw", "disk.raw"}).out, "lost+found\nvalue\n");
        expect_sound("disk.raw");
    }
}

TEST_F(PutTest, ErrorsSayWhatStaysAndWhichDiskItIs) {
    shell("mkdir d; echo small > d/a; head -c 20M /dev/urandom > d/b");
    for (const auto* const make : {"mke2fs -q -F -t ext4 disk.raw 8M", "mkfs.fat -C disk.raw 8192 >made"}) {
        shell(std::string("rm -f disk.raw; ") + make);
        expect_refusal({"put", "-f", "raw", "disk.raw", "d", "/"},
                       HasSubstr("d/b: /d/b: the file system is full; what was done before stays in the disk\n"));
        EXPECT_EQ(must_tool({"ls", "-f", "raw", "disk.raw", "/d"}).out, "a\n");
        expect_refusal({"put", "-f", "raw", "disk.raw", "d/b", "/"}, HasSubstr("the file system is full\n"));
        expect_refusal({"rm", "-f", "raw", "disk.raw", "/d/a", "/none"},
                       HasSubstr("/none: there is no such file in the disk; what was done before stays"));
    }
    shell("truncate -s 1M empty.raw");
    for (const Arguments& command : {Arguments{"df", "-f", "raw", "empty.raw"},
                                     {"ls", "-f", "raw", "empty.raw"},
                                     {"mkdir", "-f", "raw", "empty.raw", "/d"}})
        expect_refusal(command, testing::Eq("qcow: empty.raw: no file system is known here\n"));
}

TEST_F(PutTest, PutDoesNotTakeTheDiskItself) {
    shell("mke2fs -q -F -t ext4 disk.raw 8M; mkdir above; ln disk.raw above/again");
    must_qemu_img({"create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "top.qcow2"}, directory_.path());
    for (const auto* const source : {"disk.raw", "above"})
        expect_refusal({"put", "-f", "raw", "disk.raw", source, "/"}, HasSubstr("the disk would overwrite"));
    expect_refusal({"put", "top.qcow2", "top.qcow2", "/"}, HasSubstr("the disk would overwrite"));
    expect_sound("disk.raw");
}

TEST_F(PutTest, RemovesTreesWithoutTypesInEntries) {
    shell("mke2fs -q -F -t ext2 -O ^filetype disk.raw 4M; mkdir -p d/e/f; echo 1 > d/e/g");
    must_tool({"put", "-f", "raw", "disk.raw", "d", "/"});
    must_tool({"rm", "-r", "-f", "raw", "disk.raw", "/d"});
    EXPECT_EQ(must_tool({"ls", "-f", "raw", "disk.raw"}).out, "lost+found\n");
    expect_sound("disk.raw");
}

/// Each file takes about as long as the first, and not longer the more there are.
TEST_F(PutTest, LargeDirectoriesAreChangedQuickly) {
    shell(
        "mkdir many; cd many; seq 4000 | sed s/^/file-with-a-rather-long-name-/ | xargs touch; cd ..; "
        "mke2fs -q -F -t ext4 -N 10000 disk.raw 32M");
    const auto begin = std::chrono::steady_clock::now();
    must_tool({"put", "-f", "raw", "disk.raw", "many", "/"});
    must_tool({"put", "-f", "raw", "disk.raw", "many", "/"});
    must_tool({"rm", "-r", "-f", "raw", "disk.raw", "/many"});
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(30));
    expect_sound("disk.raw");
}

/// A signal ends put between two pieces of work: the file system is whole, and the image is closed.
TEST_F(PutTest, SignalsLeaveAWholeFileSystem) {
    must_run({"mke2fs", "-q", "-F", "-t", "ext4", "disk.raw", "512M"}, directory_.path());
    must_qemu_img({"convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"}, directory_.path());
    must_qemu_img({"bitmap", "--add", "disk.qcow2", "b"}, directory_.path());
    std::filesystem::create_directory(directory_.file("many"));
    put_file(directory_.file("many/0"), std::string(16 << 20, 'x'));
    for (unsigned i = 1; i < 24; ++i)
        std::filesystem::create_hard_link(directory_.file("many/0"), directory_.file(fmt::format("many/{}", i)));
    const auto before = std::filesystem::file_size(directory_.file("disk.qcow2"));
    Subprocess putting({QCOW_TOOL, "put", "disk.qcow2", "many", "/many"}, directory_.path());
    while (std::filesystem::file_size(directory_.file("disk.qcow2")) < before + (8 << 20))
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    putting.signal(SIGTERM);
    EXPECT_EQ(putting.finish().status, 128 + SIGTERM);
    const auto info = qemu_img_json({"info", "--output=json", "disk.qcow2"}, directory_.path());
    EXPECT_EQ(info["format-specific"]["data"]["bitmaps"][0]["flags"], nlohmann::json::array({"auto"}));
    must_qemu_img({"check", "-q", "disk.qcow2"}, directory_.path());
    must_qemu_img({"convert", "-f", "qcow2", "-O", "raw", "disk.qcow2", "disk.raw"}, directory_.path());
    must_run({"e2fsck", "-fn", "disk.raw"}, directory_.path());
}

TEST_F(PutTest, LoopsOfDirectoriesAreNamed) {
    shell("mkdir -p tree/a/b; mke2fs -q -t ext4 -d tree disk.raw 8M; debugfs -w -R 'link a a/b/again' disk.raw");
    expect_refusal({"rm", "-r", "-f", "raw", "disk.raw", "/a"},
                   HasSubstr("/a/b/again: the directory has two places in the file system"));
}

TEST_F(PutTest, FatHasNoAttributes) {
    shell("mkfs.fat -C disk.raw 8192 > made; echo 1 > marked; setfattr -n user.mark -v x marked; cp -a marked again");
    const auto put = tool({"put", "-f", "raw", "disk.raw", "marked", "again", "/"});
    EXPECT_EQ(put.status, 0);
    EXPECT_EQ(put.err, "qcow: warning: FAT has no extended attributes; those of the files are left out\n");
    EXPECT_EQ(must_tool({"cat", "-f", "raw", "disk.raw", "/again"}).out, "1\n");
}

TEST_F(PutTest, ErrorsNameTheOptionThatHelps) {
    shell("mke2fs -q -F -t ext4 disk.raw 8M");
    expect_refusal({"mkdir", "-f", "raw", "disk.raw", "/a/b"},
                   HasSubstr("/a/: there is no such directory in the disk; --parents"));
    must_tool({"mkdir", "-p", "-f", "raw", "disk.raw", "/a/b"});
    expect_refusal({"rm", "-f", "raw", "disk.raw", "/a"}, HasSubstr("--recursive removes what is in it"));
}

}  // namespace
}  // namespace qcow::test
