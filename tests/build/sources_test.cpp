// Sources that are odd: what is in them is in the disk, or an error says what is not.

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "filesystem/file_runs.h"
#include "support/loop_device.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class SourcesTest : public ToolTest {
protected:
    void SetUp() override {}

    std::string shell(const std::string& script) const {
        return must_run({"bash", "-euc", "PATH=$PATH:/usr/sbin:/sbin\n" + script}, directory_.path()).out;
    }
    void build(const std::string& source, const std::string& type = "ext4", const std::string& to = "disk.raw") const {
        must_tool({"build", "--fs", type, source, "-o", to});
    }
    [[nodiscard]] std::string stat(const std::string& path) const {
        return shell("debugfs -R 'stat " + path + "' disk.raw 2>/dev/null");
    }
    void expect_sound() const { shell("e2fsck -fn disk.raw"); }
    /// Builds from a specification, and returns what was said.
    [[nodiscard]] Finished build_spec(const std::string& text) const {
        put_file(directory_.file("disk.toml"), text);
        return tool({"build", "-q", "disk.toml", "-o", "disk.raw"});
    }
    void expect_spec_refused(const std::string& text, const std::string& what) const {
        const auto built = build_spec(text);
        EXPECT_EQ(built.status, 1) << built.text();
        EXPECT_THAT(built.err, HasSubstr(what));
    }
};

TEST(FileRuns, ListsHaveALimit) {
    constexpr std::uint64_t block = 4096;
    // Every second block holds data: the first or the second one.
    for (const std::uint64_t first : {0, 1}) {
        for (const std::uint64_t blocks : {65'535, 65'536, 65'537, 131'073}) {
            std::uint64_t at = 0;
            while (at < blocks * block) {
                FileRuns runs(at, blocks * block);
                for (auto data = first; data < blocks && !runs.full(); data += 2)
                    ASSERT_TRUE(runs.add(data * block, block, GuestOffset{data * block}));
                const auto list = std::move(runs).finished();
                ASSERT_LE(list.size(), FileSystem::most_extents);
                for (const auto& extent : list) {
                    ASSERT_EQ(extent.at, at);
                    ASSERT_EQ(extent.stored.has_value(), (at / block + first) % 2 == 0);
                    ASSERT_EQ(extent.length, block);
                    at += block;
                }
            }
        }
    }
}

TEST_F(SourcesTest, ADirectoryThatCannotBeReadIsNamed) {
    shell("mkdir -p tree/a tree/b; echo > tree/a/x; mkdir -m 000 tree/z");
    Arguments command = {QCOW_TOOL, "build", "--fs", "ext4", "tree", "-o", "disk.raw"};
    // Root without capabilities is as others are.
    if (geteuid() == 0) command.insert(command.begin(), {"setpriv", "--bounding-set=-all", "--inh-caps=-all"});
    const auto built = run(command, directory_.path());
    EXPECT_EQ(built.status, 1);
    EXPECT_THAT(built.err, AllOf(HasSubstr("tree/z"), HasSubstr("ermission denied")));
    shell("chmod 700 tree/z");
}

TEST_F(SourcesTest, TwoFilesWithOneNameAreAnError) {
    shell(R"SH(mkdir tree; echo 1 > tree/xxxx; echo 2 > tree/yyyy
        mke2fs -q -F -t ext2 -O ^dir_index -d tree odd.raw 4M; sed -i 's/yyyy/xxxx/g' odd.raw)SH");
    expect_refusal({"build", "--fs", "ext4", "odd.raw", "-o", "disk.raw"},
                   AllOf(HasSubstr("xxxx"), HasSubstr("two files with this name")));
}

TEST_F(SourcesTest, ABrokenChainOfFatIsAnError) {
    shell(R"SH(head -c 100000 /dev/urandom > big
        for kind in free end outside loop bad; do
            rm -f $kind.raw; mkfs.fat -F 16 -s 4 -C $kind.raw 16384 > /dev/null; mcopy -i $kind.raw big ::
        done
        entry() { printf "$2" | dd of=$1.raw bs=1 seek=$((4 * 512 + 20 * 2)) conv=notrunc status=none; }
        entry free '\0\0'; entry end '\377\377'; entry outside '\0\320'; entry loop '\3\0'; entry bad '\367\377')SH");
    for (const std::string kind : {"free", "end", "outside", "loop", "bad"}) {
        SCOPED_TRACE(kind);
        const auto got = tool({"get", "-f", "raw", kind + ".raw", "/big", "out"});
        EXPECT_EQ(got.status, 1) << got.text();
        EXPECT_THAT(got.err, Not(testing::EndsWith(": \n")));
        EXPECT_EQ(tool({"cat", "-f", "raw", kind + ".raw", "/big"}).status, 1);
        EXPECT_EQ(tool({"build", "--fs", "ext4", kind + ".raw", "-o", "disk.raw"}).status, 1);
        shell("test ! -e out");
    }
}

TEST_F(SourcesTest, HardLinksOfCpioHaveTheirContents) {
    shell("mkdir c; echo data > c/a; ln c/a c/b; ln c/a c/z; (cd c; find . | cpio -o -H newc --quiet) > c.raw");
    for (const auto* name : {"/a", "/b", "/z"}) EXPECT_EQ(must_tool({"cat", "-f", "raw", "c.raw", name}).out, "data\n");
    const auto files = nlohmann::json::parse(must_tool({"ls", "--json", "-f", "raw", "c.raw"}).out);
    for (const auto& file : files) EXPECT_EQ(file["size"], 5) << file;
}

TEST_F(SourcesTest, NamesInArchivesAreUtf8) {
    shell(R"SH(python3 -c "
import zipfile
with zipfile.ZipFile('u.raw', 'w') as made: made.writestr('\u00fcn\u00ef', 'x'); made.writestr('ok', 'y')")SH");
    EXPECT_EQ(must_tool({"ls", "-f", "raw", "u.raw"}).out, "ok\n\xc3\xbcn\xc3\xaf\n");
    EXPECT_EQ(must_tool({"cat", "-f", "raw", "u.raw", "/\xc3\xbcn\xc3\xaf"}).out, "x");
}

TEST_F(SourcesTest, AclsOfArchivesKeepTheirMask) {
    shell(R"SH(python3 - <<'PROGRAM'
import tarfile
def make(name, acl):
    with tarfile.open(name, 'w', format=tarfile.PAX_FORMAT) as made:
        entry = tarfile.TarInfo('acl')
        entry.mode = 0o664
        entry.pax_headers = {'SCHILY.acl.access': acl}
        made.addfile(entry)
make('number.tar', 'user::rw-,user:1234:rw-:1234,group::r--,mask::rw-,other::r--')
make('name.tar', 'user::rw-,user:nobody-has-this:rw-,group::r--,mask::rw-,other::r--')
PROGRAM
)SH");
    build("number.tar");
    expect_sound();
    EXPECT_THAT(stat("/acl"), HasSubstr("Mode:  0664"));
    EXPECT_THAT(shell("debugfs -R 'ea_get -x /acl system.posix_acl_access' disk.raw 2>/dev/null"),
                HasSubstr("02 00 06 00 d2 04 00 00"));
    const std::string get = QCOW_TOOL " get -f raw ";
    EXPECT_THAT(shell(get + "number.tar /acl got; getfacl -cn got"), HasSubstr("user:1234:rw-"));
    EXPECT_THAT(shell(get + "name.tar /acl named 2>&1"), HasSubstr("the ACLs of 1 files are left out"));
    expect_refusal({"build", "--fs", "ext4", "name.tar", "-o", "disk.raw"},
                   AllOf(HasSubstr("acl"), HasSubstr("nobody-has-this"), HasSubstr("--numeric-owner")));
}

TEST_F(SourcesTest, TimesThatAFileSystemCannotStoreAreMoved) {
    shell(R"SH(mkdir old; python3 - <<'PROGRAM'
import tarfile
with tarfile.open('times.tar', 'w', format=tarfile.PAX_FORMAT) as made:
    for name, time in (('early', -99999999999), ('late', 99999999999), ('f2040', 2208988800)):
        entry = tarfile.TarInfo(name)
        entry.mtime = time
        made.addfile(entry)
PROGRAM
)SH");
    const auto seconds = [&](const std::string& path) {
        const auto files = nlohmann::json::parse(must_tool({"ls", "--json", "-f", "raw", "disk.raw", path}).out);
        return files[0]["modified"]["sec"].get<std::int64_t>();
    };
    const auto source = std::string("[filesystem]\ntype = \"ext4\"\nsource = \"times.tar\"\n");
    auto built = build_spec(source);
    EXPECT_EQ(built.status, 0) << built.text();
    EXPECT_THAT(built.err, HasSubstr("cannot store the times of 2 files"));
    EXPECT_EQ(seconds("/early"), -0x80000000LL);
    EXPECT_EQ(seconds("/late"), 0x37fffffffLL);
    EXPECT_EQ(seconds("/f2040"), 2208988800);
    built = build_spec(source + "options = { inode_size = 128 }\n");
    EXPECT_THAT(built.err, HasSubstr("cannot store the times of 3 files"));
    EXPECT_EQ(seconds("/f2040"), 0x7fffffffLL);
    built = build_spec("[filesystem]\ntype = \"fat16\"\nsource = \"times.tar\"\n");
    EXPECT_EQ(built.status, 0) << built.text();
    EXPECT_THAT(built.err, HasSubstr("cannot store the times of 2 files"));
}

TEST_F(SourcesTest, FractionsBefore1970AreKept) {
    shell(R"SH(mkdir tree; echo > tree/f; touch -d @-1500000000.123456789 tree/f
        truncate -s 100M tree/hole; printf end >> tree/hole; touch -d @1500000000.5 tree/hole
        tar --format=pax --sparse -cf tree.tar -C tree .)SH");
    build("tree.tar");
    expect_sound();
    // GNU tar reads back what it has written, by way of a disk. A hole takes no place in the archive.
    shell("mkdir out; '" QCOW_TOOL "' get --tar -f raw disk.raw / > out.tar; tar -xf out.tar -C out");
    const auto times = [&](const std::string& tree) { return shell("cd " + tree + "; stat -c '%n %.9Y %s' f hole"); };
    EXPECT_EQ(times("out"), times("tree"));
    EXPECT_LT(std::filesystem::file_size(directory_.file("out.tar")), 1'000'000U);
    shell("cmp tree/hole out/hole");
}

TEST_F(SourcesTest, DirectoriesHaveAsManySubdirectoriesAsTheFileSystemCounts) {
    shell(R"SH(python3 -c "
import tarfile
with tarfile.open('dirs.tar', 'w') as made:
    for i in range(64999):
        entry = tarfile.TarInfo('d%d' % i); entry.type = tarfile.DIRTYPE; made.addfile(entry)")SH");
    expect_refusal({"build", "--fs", "ext2", "dirs.tar", "-o", "disk.raw"}, HasSubstr("subdirectories"));
}

TEST_F(SourcesTest, ExtSaysWhichSizesItCannotHave) {
    shell("mkdir tree; echo > tree/f");
    for (const auto* type : {"ext2", "ext4"}) {
        expect_refusal({"build", "--fs", type, "tree", "-o", "disk.qcow2", "--size", "17T"},
                       HasSubstr("2^32 - 1 blocks, of 4096 bytes"));
        expect_refusal({"build", "--fs", type, "tree", "-o", "disk.qcow2", "--size", "64K"},
                       HasSubstr("No space: 65536 bytes have no room for the tables of ext"));
    }
}

TEST_F(SourcesTest, FatNamesThatDifferInCaseKeepTheirShortName) {
    shell("mkdir tree; for n in bootcode.bin BOOTCO~1.BIN Mixed.Txt 'two words.txt'; do echo > \"tree/$n\"; done");
    build("tree", "fat16");
    const auto listed = shell("fsck.fat -n disk.raw > /dev/null; mdir -a -i disk.raw ::");
    EXPECT_THAT(listed, AllOf(HasSubstr("BOOTCODE BIN"), HasSubstr("BOOTCO~1 BIN"), HasSubstr("MIXED    TXT"),
                              HasSubstr("TWOWOR~1 TXT"), HasSubstr("bootcode.bin")));
}

TEST_F(SourcesTest, FatRefusesNamesThatReadersConfuse) {
    const auto refused = [&](const std::string& files, const std::string& what) {
        shell("rm -rf tree; mkdir tree; cd tree; touch " + files);
        expect_refusal({"build", "--fs", "vfat", "tree", "-o", "disk.raw"}, HasSubstr(what));
    };
    refused("con", "name of a device");
    refused("AUX.txt", "name of a device");
    refused("Lpt1.x.y", "name of a device");
    refused("\xc3\x9c \xc3\xbc", "differs only in case");
    refused("\xd0\xaf \xd1\x8f", "differs only in case");
    shell("rm -rf tree; mkdir tree; cd tree; touch console com0 xcon '\xc3\xb7' '\xc3\x97'");
    build("tree", "vfat");
}

TEST_F(SourcesTest, LongNamesOfFatAreWhole) {
    shell(R"SH(mkdir tree; for n in 194 195 196 208 254 255; do echo $n > tree/$(printf "%0${n}d" 7); done
        for i in $(seq 40); do echo $i > "tree/$(printf '%0200d' $i) end"; done)SH");
    build("tree", "fat16", "fat.raw");
    must_tool({"get", "-f", "raw", "fat.raw", "/", "out"});
    shell("diff -r tree out");
}

TEST_F(SourcesTest, AnMbrWithLargeSectorsIsRead) {
    shell("mkdir tree; echo hi > tree/f");
    const auto built = build_spec(
        "[image]\nsector_size = 4096\npartition_table = \"mbr\"\n[[partitions]]\n[partitions.filesystem]\n"
        "type = \"ext4\"\nsource = \"tree\"\n");
    EXPECT_EQ(built.status, 0) << built.text();
    EXPECT_EQ(must_tool({"cat", "-f", "raw", "disk.raw:1", "/f"}).out, "hi\n");
    EXPECT_THAT(must_tool({"partitions", "--json", "-f", "raw", "disk.raw"}).out, HasSubstr("\"sector-size\": 4096"));
}

TEST_F(SourcesTest, PartitionsThatATableCannotHaveAreRefused) {
    const std::string part = "[[partitions]]\nsize = \"1MiB\"\n";
    const std::string mbr = "[image]\npartition_table = \"mbr\"\n";
    expect_spec_refused(part + "type = \"00000000-0000-0000-0000-000000000000\"\n", "is not used");
    expect_spec_refused(mbr + part + "type = \"0x00\"\n", "is not used");
    expect_spec_refused(mbr + part + "type = \"0x05\"\n", "extended partition");
    expect_spec_refused(mbr + part + "type = \"0xee\"\n", "announces a GPT");
    expect_spec_refused(mbr + part + "bootable = true\n" + part + "bootable = true\n", "an MBR has one");
    const std::string uuid = "uuid = \"0fc63daf-8483-4772-8e79-3d69d8477de4\"\n";
    expect_spec_refused(mbr + part + uuid, "which an MBR cannot store");
    expect_spec_refused(part + uuid + part + uuid, "has the uuid of partition 1");
    expect_spec_refused(mbr + part + part + part + part + part, "disk.toml:11:1: partition 5: an MBR has at most four");
    expect_spec_refused(part + "name = \"" + std::string(37, 'n') + "\"\n", "disk.toml:3:8: partition 1: the name");
    expect_spec_refused(mbr + "[[partitions]]\nsize = \"3TiB\"\n", "disk.toml:4:8: partition 1: it ends behind sector");
    expect_spec_refused("[[partitions]]\nsize = \"4KiB\"\nfilesystem = { type = \"ext4\" }\n",
                        "disk.toml:2:8: partition 1: No space: 4096 bytes have no room for the tables");
    expect_spec_refused("[filesystem]\ntype = \"ext4\"\nfiles = [{ path = \"/a\", content = \"\", mode = 644 }]\n",
                        "not written as an octal number");
    expect_spec_refused("[filesystem]\ntype = \"ext4\"\nfiles = [{ pth = \"/a\" }]\n", "did you mean \"path\"?");
}

TEST_F(SourcesTest, AGptEndsWithTheDevice) {
    LoopDevice device(std::uint64_t{64} << 20);
    if (!device.obstacle().empty()) GTEST_SKIP() << device.obstacle();
    put_file(directory_.file("disk.toml"),
             "[[partitions]]\nsize = \"8MiB\"\n[[partitions]]\nsize = \"remaining\"\ntype = \"swap\"\n");
    const auto built = tool({"build", "-q", "disk.toml", "-o", device.path()});
    EXPECT_EQ(built.status, 0) << built.text();
    const auto listed = must_tool({"partitions", "--json", "-f", "raw", device.path()}).out;
    EXPECT_THAT(listed, HasSubstr("\"warnings\": []"));
    EXPECT_GT(nlohmann::json::parse(listed)["partitions"][1]["size"].get<std::uint64_t>(), std::uint64_t{50} << 20);
}

TEST_F(SourcesTest, DisksWithOtherFilesHaveOtherUuids) {
    const auto uuid = [&](const std::string& tree, const std::string& type, const Arguments& more = {}) {
        Arguments command = {"build", "--fs", type, tree, "-o", "disk.raw"};
        command.insert(command.end(), more.begin(), more.end());
        must_tool(command);
        return shell("blkid -p -s UUID -o value disk.raw");
    };
    shell("mkdir one two; echo 1 > one/f; echo 22 > two/f; touch -d @1000000000 one one/f two two/f; cp -a one same");
    for (const auto* type : {"ext4", "vfat"}) {
        EXPECT_NE(uuid("one", type), uuid("two", type));
        EXPECT_EQ(uuid("one", type), uuid("same", type));
        EXPECT_EQ(uuid("one", type, {"--seed", "x"}), uuid("two", type, {"--seed", "x"}));
    }
}

TEST_F(SourcesTest, LayersFollowLinksOfThoseBelow) {
    shell(R"SH(mkdir -p base/usr/bin base/keep upper/bin upper/keep empty
        echo sh > base/usr/bin/sh; ln -s usr/bin base/bin; chmod 700 base/keep
        echo ls > upper/bin/ls; echo new > upper/keep/new
        tar -C base -cf base.tar .; tar -C upper -cf upper.tar bin/ls keep/new; tar -C empty -cf empty.tar --files-from=/dev/null
        tar -C upper -cf replaced.tar bin)SH");
    must_tool({"build", "--fs", "ext4", "base.tar", "empty.tar", "upper.tar", "-o", "disk.raw"});
    expect_sound();
    EXPECT_EQ(must_tool({"ls", "-f", "raw", "disk.raw", "/usr/bin"}).out, "ls\nsh\n");
    EXPECT_EQ(must_tool({"cat", "-f", "raw", "disk.raw", "/bin/ls"}).out, "ls\n");
    EXPECT_THAT(stat("/keep"), HasSubstr("Mode:  0700"));
    // A directory that the layer has replaces the link.
    must_tool({"build", "--fs", "ext4", "base.tar", "replaced.tar", "-o", "disk.raw"});
    EXPECT_EQ(must_tool({"ls", "-f", "raw", "disk.raw", "/bin"}).out, "ls\n");
}

TEST_F(SourcesTest, WhatDamageLeavesIsRead) {
    shell(R"SH(mkdir tree; echo good > tree/good; echo > tree/zzz
        mke2fs -q -F -t ext2 -O ^dir_index -d tree odd.raw 4M; sed -i 's,zzz,../,g' odd.raw
        head -c 3000000 /dev/urandom > tree/large; (cd tree; tar -cf ../cut.raw good large zzz); truncate -s 2M cut.raw)SH");
    const auto read = [&](const std::string& disk, const std::string& names, const std::string& what) {
        const auto listed = tool({"ls", "-f", "raw", disk});
        EXPECT_EQ(listed.status, 1);
        EXPECT_EQ(listed.out, names);
        EXPECT_THAT(listed.err, HasSubstr(what));
        EXPECT_EQ(must_tool({"cat", "-f", "raw", disk, "/good"}).out, "good\n");
        EXPECT_EQ(tool({"get", "-f", "raw", disk, "/", disk + ".out"}).status, 1);
        EXPECT_EQ(file_bytes(directory_.file(disk + ".out/good")), "good\n");
        EXPECT_EQ(tool({"build", "--fs", "ext4", disk, "-o", "disk.raw"}).status, 1);
    };
    read("odd.raw", "good\nlost+found\n", "which no entry can have");
    read("cut.raw", "good\nlarge\n", "runcated");
}

TEST_F(SourcesTest, ATimeOfAFileIsMoreThanTheTimeOfAll) {
    const auto built = build_spec(
        "[filesystem]\ntype = \"ext4\"\nmtime = 5\n"
        "files = [{ path = \"/a\", content = \"a\", mtime = 7 }, { path = \"/b\", content = \"b\" }]\n");
    EXPECT_EQ(built.status, 0) << built.text();
    EXPECT_THAT(stat("/a"), HasSubstr("mtime: 0x00000007"));
    EXPECT_THAT(stat("/b"), HasSubstr("mtime: 0x00000005"));
}

TEST_F(SourcesTest, OnlyDisksHavePartitions) {
    shell("mkdir tree; tar -cf tree.tar tree");
    for (const auto* const source : {"tree:99", "tree.tar:3"}) {
        const auto built = tool({"build", "--fs", "ext4", source, "-o", "disk.raw"});
        EXPECT_EQ(built.status, 1) << built.text();
        EXPECT_THAT(built.err, HasSubstr("has no partitions; leave out"));
    }
}

TEST_F(SourcesTest, FilesInArchivesHaveNames) {
    shell(
        "python3 -c \"import io, tarfile; i = tarfile.TarInfo(''); i.size = 1; "
        "tarfile.open('odd.tar', 'w').addfile(i, io.BytesIO(b'x'))\"");
    const auto built = tool({"build", "--fs", "ext4", "odd.tar", "-o", "disk.raw"});
    EXPECT_EQ(built.status, 1) << built.text();
    EXPECT_THAT(built.err, HasSubstr("an entry that is no directory has no name"));
}

TEST_F(SourcesTest, DeviceNumbersFitOrAreRefused) {
    const auto build_device = [&](const std::string& major, const std::string& minor) {
        shell("python3 -c \"import tarfile; i = tarfile.TarInfo('c'); i.type = tarfile.CHRTYPE; i.devmajor = " + major +
              "; i.devminor = " + minor + "; tarfile.open('c.tar', 'w', format=tarfile.GNU_FORMAT).addfile(i)\"");
        return tool({"build", "-q", "--fs", "ext4", "c.tar", "-o", "disk.raw"});
    };
    EXPECT_EQ(build_device("4095", "1048575").status, 0);
    EXPECT_THAT(shell("debugfs -R 'ls -l /' disk.raw; debugfs -R 'stat /c' disk.raw 2>&1"), HasSubstr("4095:1048575"));
    for (const auto& [major, minor] :
         {std::pair("4096", "0"), {"1", "1048576"}, {"2**32", "2**32"}, {"5000", "2000000"}}) {
        const auto refused = build_device(major, minor);
        EXPECT_EQ(refused.status, 1) << refused.text();
        EXPECT_THAT(refused.err, AllOf(HasSubstr("/c: "), HasSubstr("ext cannot hold a device")));
    }
}

TEST_F(SourcesTest, AJournalThatWasNotReplayedIsSaid) {
    shell("mkdir tree; mke2fs -q -t ext4 source.raw 8M; debugfs -w -R 'feature needs_recovery' source.raw");
    const auto built = tool({"build", "-q", "--fs", "ext4", "source.raw", "-o", "disk.raw"});
    EXPECT_EQ(built.status, 0) << built.text();
    EXPECT_THAT(built.err, HasSubstr("source.raw: the journal was not replayed"));
}

TEST_F(SourcesTest, TheLimitOfEachFatIsNamed) {
    shell("mkdir tree; truncate -s 200M tree/large");
    const auto built = tool({"build", "--fs", "fat12", "tree", "-o", "disk.raw"});
    EXPECT_EQ(built.status, 1) << built.text();
    EXPECT_THAT(built.err, HasSubstr("no size for FAT12, which has 1 to 4084 clusters of 512 to 32768 bytes"));
}

}  // namespace
}  // namespace qcow::test
