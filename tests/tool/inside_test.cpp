// qcow partitions, ls, tree, find, cat, get and df. The file systems are made by their own programs,
// which also judge what comes out.

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "support/effort.h"
#include "tool/inside_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

TEST_F(InsideTest, GetsEveryPropertyOutOfExt) {
    make_tree();
    const std::vector<std::string> kinds = {"-t ext2 -b 1024 -I 256",
                                            "-t ext3 -b 2048 -I 256",
                                            "-t ext4 -b 4096 -I 512 -O 64bit,inline_data",
                                            "-t ext4 -O bigalloc -C 65536 -I 256",
                                            "-t ext4 -O ^extent,^64bit,^has_journal -I 256",
                                            "-t ext4 -O casefold,metadata_csum,ea_inode -I 256"};
    for (const auto& kind : kinds) {
        make_ext("disk.raw", kind);
        must_tool({"get", "-f", "raw", "disk.raw", "/", "out"});
        EXPECT_EQ(differences(), "") << kind;
        shell("rm -r out disk.raw");
    }
    shell(
        "truncate -s 4M old.raw; mke2fs -q -F -t ext2 -r 0 old.raw; debugfs -w -R 'write tree/a/big big' old.raw "
        "2>/dev/null");
    must_tool({"get", "-f", "raw", "old.raw", "/big", "big"});
    EXPECT_EQ(read_file(directory_ / "big"), read_file(directory_ / "tree/a/big"));
}

TEST_F(InsideTest, ReadsThroughTheEngine) {
    make_tree();
    make_ext("disk.raw", "-t ext4 -I 256 -L root");
    must_qemu_img({"convert", "-c", "-O", "qcow2", "disk.raw", "base.qcow2"}, directory_.path());
    must_qemu_img({"snapshot", "-c", "before", "base.qcow2"}, directory_.path());
    const auto base = read_file(directory_ / "base.qcow2");
    must_tool({"get", "--force-share", "base.qcow2", "/", "out"});
    EXPECT_EQ(differences(), "");
    EXPECT_EQ(read_file(directory_ / "base.qcow2"), base) << "reading wrote";
    shell("rm -r out; mkdir out");
    must_tool({"get", "base.qcow2", "/a", "/many", "out"});
    EXPECT_EQ(shell("ls out"), "a\nmany\n");
    shell("rm -r out; mkdir out; '" QCOW_TOOL
          "' get --tar base.qcow2 / | tar --xattrs --xattrs-include='*' --acls -C out -xpf -; rm tree/socket");
    EXPECT_EQ(differences(), "");

    must_qemu_img({"create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"}, directory_.path());
    EXPECT_EQ(must_tool({"cat", "top.qcow2", "/a/b/link"}).out, "hello\n");
    must_tool({"rm", "-r", "top.qcow2", "/many"});
    EXPECT_THAT(must_tool({"ls", "top.qcow2"}).out, Not(HasSubstr("many")));
    EXPECT_EQ(read_file(directory_ / "base.qcow2"), base) << "the change went into the backing file";
    must_tool({"rm", "-r", "base.qcow2", "/a"});
    EXPECT_THAT(must_tool({"ls", "base.qcow2"}).out, Not(HasSubstr("a\n")));
    EXPECT_EQ(must_tool({"cat", "-l", "before", "base.qcow2", "/a/f"}).out, "hello\n");
    EXPECT_THAT(must_tool({"info", "base.qcow2"}).out, HasSubstr("ext4 \"root\""));
    EXPECT_EQ(json::parse(must_tool({"df", "--json", "top.qcow2"}).out)[0]["label"], "root");
}

TEST_F(InsideTest, ListsAndFinds) {
    make_tree();
    make_ext("disk.raw", "-t ext4 -I 256");
    const Arguments raw = {"-f", "raw", "disk.raw"};
    const auto with = [&](Arguments front, const Arguments& back) {
        front.insert(front.end(), raw.begin(), raw.end());
        front.insert(front.end(), back.begin(), back.end());
        return front;
    };
    EXPECT_EQ(must_tool(with({"ls"}, {"/a"})).out, "b\nbig\nf\nhard\n");
    EXPECT_THAT(must_tool(with({"ls", "-l"}, {"/a"})).out, HasSubstr("-rwsr-xr-x"));
    EXPECT_THAT(must_tool(with({"ls"}, {})).out, HasSubstr("odd\\x0a\\xffname"));
    EXPECT_THAT(must_tool(with({"ls", "-R"}, {"/a"})).out, HasSubstr("/a/b:\nc\nlink\n"));
    const auto file = json::parse(must_tool(with({"ls", "--json"}, {"/a/f"})).out)[0];
    EXPECT_EQ(file["uid"], 1234);
    EXPECT_EQ(file["gid"], 70000);
    EXPECT_EQ(file["links"], 2);
    EXPECT_EQ(file["mode"], "4755");
    EXPECT_EQ(json::parse(must_tool(with({"ls", "--json"}, {"/device"})).out)[0]["device"], "300:70000");
    EXPECT_THAT(must_tool(with({"tree"}, {"/a"})).out, HasSubstr("        link -> ../f\n"));
    EXPECT_EQ(must_tool(with({"find"}, {"/", "--type", "f", "--size", "+200k"})).out, "/a/big\n/sparse\n");
    EXPECT_EQ(must_tool(with({"find"}, {"/a", "--name", "h*d"})).out, "/a/hard\n");
    for (const auto* const time : {"2002-01-01", "2002-01-01T00:00:00Z", "@1009843200"})
        EXPECT_EQ(must_tool(with({"find"}, {"/", "--older", time})).out, "/a/f\n/a/hard\n/absolute\n") << time;
    // GNU tar knows all that it reads.
    EXPECT_EQ(shell(std::string("'") + QCOW_TOOL + "' get --tar -f raw disk.raw /a/f | tar -t 2>&1"), "f\n");
    expect_refusal(with({"cat"}, {"/nothing"}), HasSubstr("there is no such file in the disk"));
    expect_refusal(with({"cat"}, {"/a"}), HasSubstr("this is a directory"));
    expect_refusal(with({"get"}, {"/a/f", "tree/a/f"}), HasSubstr("it is not replaced"));
    shell("debugfs -w -R 'sif /a/big flags 0x80800' disk.raw 2>/dev/null");
    expect_refusal(with({"cat"}, {"/a/big"}), HasSubstr("the contents are encrypted (fscrypt)"));
    shell("debugfs -w -R 'feature needs_recovery' disk.raw 2>/dev/null");
    EXPECT_THAT(tool(with({"ls"}, {"/a"})).err, HasSubstr("the journal was not replayed"));
    expect_refusal(with({"rm"}, {"/a/f"}), HasSubstr("its journal must be replayed"));
}

TEST_F(InsideTest, NamesThatAreNoTextCanBeUsed) {
    shell(R"SH(mkdir tree; cd tree; printf 1 > "$(printf 'n\377')"; printf 2 > "$(printf 'n\376')"
        printf 3 > "$(printf 'li\nne')"; ln -s "$(printf 'n\377')" link)SH");
    make_ext("disk.raw", "-t ext4", "4M");
    const auto get = [&](const std::string& path) { return must_tool({"cat", "-f", "raw", "disk.raw", path}).out; };
    const auto listed = json::parse(must_tool({"ls", "--json", "-f", "raw", "disk.raw"}).out);
    std::vector<std::string> found;
    for (const auto& entry : listed) {
        if (entry.contains("path-base64")) found.push_back(entry["path-base64"]);
        EXPECT_EQ(entry.contains("target-base64"), entry["name"] == "link");
    }
    ASSERT_EQ(found.size(), 2U);
    std::string contents;
    for (const auto& path : found) contents += get(shell("printf " + path + " | base64 -d"));
    EXPECT_EQ(contents, "21");
    EXPECT_EQ(must_tool({"ls", "-f", "raw", "disk.raw"}).out, "li\\x0ane\nlink\nlost+found\nn\\xfe\nn\\xff\n");
    EXPECT_EQ(get("/n\\xff") + get("/n\\xfe") + get("/li\\x0ane"), "123");
    must_tool({"get", "-f", "raw", "disk.raw", "/n\\xfe", "got"});
    EXPECT_EQ(read_file(directory_ / "got"), "2");
    // A name that looks like this is no other one's.
    shell("printf 4 > 'n\\xff'; printf 5 > 'm\\xff'");
    must_tool({"put", "-f", "raw", "disk.raw", "n\\xff", "m\\xff", "/"});
    EXPECT_EQ(get("/m\\xff"), "5");
    expect_refusal({"cat", "-f", "raw", "disk.raw", "/n\\xff"}, HasSubstr("two files are shown like this"));
}

TEST_F(InsideTest, ChecksumsCanBeIgnored) {
    shell("mkdir -p tree/d; echo text > tree/d/f");
    make_ext("disk.raw", "-t ext4 -O metadata_csum", "4M");
    shell(R"SH(block=$(debugfs -R 'bmap /d 0' disk.raw 2>/dev/null)
        printf '\1\2\3\4' | dd of=disk.raw bs=1 seek=$((block * 1024 + 1020)) conv=notrunc status=none)SH");
    const auto ls = [&](const Arguments& options) {
        Arguments command = {"ls", "-f", "raw", "disk.raw", "/d"};
        command.insert(command.end(), options.begin(), options.end());
        return tool(command);
    };
    EXPECT_EQ(ls({}).status, 1);
    EXPECT_THAT(ls({}).err, HasSubstr("checksum"));
    EXPECT_EQ(ls({"--ignore-checksums"}).out, "f\n");
    EXPECT_EQ(must_tool({"cat", "--ignore-checksums", "-f", "raw", "disk.raw", "/d/f"}).out, "text\n");
}

TEST_F(InsideTest, GoesOnAfterAFileThatIsMissing) {
    shell("mke2fs -q -F -t ext4 disk.raw 4M; echo A > -A; echo B > B");
    must_tool({"put", "-f", "raw", "disk.raw", "--", "-A", "B", "/"});
    const auto printed = tool({"cat", "-f", "raw", "disk.raw", "/-A", "/missing", "/lost+found", "/B"});
    EXPECT_EQ(printed.status, 1);
    EXPECT_EQ(printed.out, "A\nB\n");
    EXPECT_THAT(printed.err, AllOf(HasSubstr("/missing: there is no such file"), HasSubstr("this is a directory")));
    const auto listed = tool({"ls", "-f", "raw", "disk.raw", "/missing", "/B"});
    EXPECT_EQ(listed.status, 1);
    EXPECT_EQ(listed.out, "/B:\n/B\n");
    EXPECT_THAT(listed.err, HasSubstr("/missing: there is no such file"));
    // What follows "--" is no option.
    EXPECT_EQ(must_tool({"cat", "-f", "raw", "disk.raw", "--", "-A"}).out, "A\n");
    EXPECT_EQ(must_tool({"cat", "-f", "raw", "disk.raw", "B", "--", "/B", "-A"}).out, "B\nB\nA\n");
    shell("mkdir got");
    must_tool({"get", "-f", "raw", "--", "disk.raw", "-A", "B", "got"});
    for (const auto* const command : {"info", "map", "check"})
        expect_refusal({command, "-f", "raw", "disk.raw", "--", "-x"}, HasSubstr("\"-x\" is one argument too many"));
}

TEST_F(InsideTest, GetsInodesByNumber) {
    shell("mke2fs -q -F -t ext4 disk.raw 4M; echo A > A; echo B > B");
    must_tool({"put", "-f", "raw", "disk.raw", "A", "B", "/"});
    must_tool({"get", "--inode", "12", "--inode", "13", "-f", "raw", "disk.raw", "."});
    EXPECT_EQ(read_file(directory_ / "inode-12") + read_file(directory_ / "inode-13"), "A\nB\n");
}

TEST_F(InsideTest, SignalsLeaveNoPartOfAFile) {
    shell("truncate -s 600M disk.raw; mke2fs -q -F -t ext2 disk.raw; head -c 400M /dev/zero | tr '\\0' x > large");
    must_tool({"put", "-f", "raw", "disk.raw", "large", "/"});
    shell("rm large; mkdir out");
    Subprocess getting({"sh", "-c", "echo $$ > pid; exec " QCOW_TOOL " get -f raw disk.raw /large out"},
                       directory_.path());
    const auto has_written = [&] {
        const auto bytes =
            shell("[ -s pid ] || { echo 0; exit; }; sed -n 's/^wchar: //p' /proc/$(cat pid)/io || echo 999999999");
        return std::strtoul(bytes.c_str(), nullptr, 10) > 20'000'000;
    };
    while (!has_written()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    getting.signal(SIGINT);
    EXPECT_EQ(getting.finish().status, 128 + SIGINT);
    EXPECT_EQ(shell("ls -A out"), "");
    must_tool({"get", "-f", "raw", "disk.raw", "/large", "out"});
}

TEST_F(InsideTest, ReadsOtherFileSystems) {
    shell(R"SH(mkdir -p tree/sub; cd tree; head -c 300000 /dev/urandom > big; echo hello > sub/file; ln -s sub/file link
        for i in $(seq 50); do echo $i > "sub/A rather long name $i.txt"; done)SH");
    const auto same = [&](const std::string& disk) {
        must_tool({"get", "-f", "raw", disk, "/", "out"});
        shell("diff -r --no-dereference tree out; rm -r out");
    };
    shell("mksquashfs tree squash.raw -quiet -no-progress > /dev/null; truncate -s %512 squash.raw");
    same("squash.raw");
    shell("tar -C tree -cf tar.raw .");
    same("tar.raw");
    shell("xorriso -as mkisofs -quiet -R -o iso.raw tree 2>/dev/null");
    same("iso.raw");
    shell("rm tree/link");
    for (const auto* const kind : {"12", "16", "32"}) {
        shell("rm -f fat.raw; truncate -s " + std::string(kind == std::string("12") ? "8M" : "64M") +
              " fat.raw; mkfs.vfat -n LABEL -F " + kind +
              " fat.raw > /dev/null; mcopy -i fat.raw -s tree/big tree/sub ::");
        same("fat.raw");
    }
    shell(
        "truncate -s 16M ntfs.raw; mkntfs -q -F -L LABEL ntfs.raw 2>/dev/null; ntfscp -f ntfs.raw tree/big big; ntfscp "
        "-f ntfs.raw tree/sub/file file");
    EXPECT_EQ(must_tool({"cat", "-f", "raw", "ntfs.raw", "/big"}).out, read_file(directory_ / "tree/big"));
    EXPECT_EQ(must_tool({"cat", "-f", "raw", "ntfs.raw", "/file"}).out, "hello\n");
    EXPECT_EQ(must_tool({"ls", "-f", "raw", "ntfs.raw"}).out, "big\nfile\n");
    shell("truncate -s 16M exfat.raw; mkfs.exfat -L LABEL exfat.raw > /dev/null");
    EXPECT_EQ(must_tool({"ls", "-f", "raw", "exfat.raw"}).out, "");
    for (const auto* const disk : {"fat.raw", "ntfs.raw", "exfat.raw"})
        EXPECT_THAT(must_tool({"partitions", "-f", "raw", disk}).out, HasSubstr("\"LABEL\"")) << disk;
    // What was deleted can still be found in FAT.
    shell("mdel -i fat.raw ::/big");
    EXPECT_THAT(must_tool({"ls", "-f", "raw", "fat.raw"}).out, Not(HasSubstr("ig")));
    const auto entries = json::parse(must_tool({"ls", "--deleted", "--json", "-f", "raw", "fat.raw"}).out);
    const auto deleted = std::ranges::find_if(entries, [](const auto& entry) { return entry.value("deleted", false); });
    ASSERT_NE(deleted, entries.end()) << entries;
    EXPECT_EQ(must_tool({"cat", "--inode", std::to_string((*deleted)["inode"].get<int>()), "-f", "raw", "fat.raw"}).out,
              read_file(directory_ / "tree/big"));
    shell("truncate -s 300M xfs.raw; mkfs.xfs -q xfs.raw");
    expect_refusal({"ls", "-f", "raw", "xfs.raw"}, HasSubstr("xfs: nothing in qcowkit reads the files of this"));
}

// ---- Partitions ----

/// Compares with what sfdisk says.
void expect_as_sfdisk(const json& ours, const json& theirs, std::uint64_t sector) {
    const auto& table = theirs["partitiontable"];
    EXPECT_EQ(ours["table"], table["label"] == "dos" ? "mbr" : "gpt");
    std::string id = table["id"];
    std::ranges::transform(id, id.begin(), [](unsigned char c) { return std::tolower(c); });
    EXPECT_EQ(ours["uuid"], id);
    ASSERT_EQ(ours["partitions"].size(), table["partitions"].size());
    for (std::size_t i = 0; i < ours["partitions"].size(); ++i) {
        const auto& mine = ours["partitions"][i];
        const auto& other = table["partitions"][i];
        EXPECT_EQ(mine["start"], other["start"].get<std::uint64_t>() * sector);
        EXPECT_EQ(mine["size"], other["size"].get<std::uint64_t>() * sector);
        std::string type = other["type"];
        std::ranges::transform(type, type.begin(), [](unsigned char c) { return std::tolower(c); });
        const std::string hex = mine["type"];
        EXPECT_TRUE(hex == type || std::stoul(hex.substr(2), nullptr, 16) == std::stoul(type, nullptr, 16))
            << mine << other;
        EXPECT_EQ(mine.value("name", ""), other.value("name", ""));
        EXPECT_EQ(mine.value("bootable", false), other.value("bootable", false));
        const std::string node = other["node"];
        EXPECT_TRUE(node.ends_with(std::to_string(mine["number"].get<int>()))) << mine << other;
    }
}

TEST_F(InsideTest, ListsPartitions) {
    const auto listed = [&](const std::string& disk) {
        return json::parse(must_tool({"partitions", "--json", "-f", "raw", disk}).out);
    };
    const auto theirs = [&](const std::string& disk) { return json::parse(shell("sfdisk --json " + disk)); };
    shell(R"SH(truncate -s 64M gpt.raw; sfdisk -q gpt.raw <<<'label: gpt
        size=8M, type=uefi, name="EFI ä"
        size=16M, type=linux, bootable
        start=40M, size=4M, type=swap')SH");
    expect_as_sfdisk(listed("gpt.raw"), theirs("gpt.raw"), 512);
    EXPECT_EQ(listed("gpt.raw")["partitions"][0]["type-name"], "EFI System");
    shell(R"SH(truncate -s 64M mbr.raw; sfdisk -q mbr.raw <<<'label: dos
        size=8M, type=c, bootable
        type=5
        size=4M, type=83
        size=8M, type=82
        size=2M, type=83')SH");
    expect_as_sfdisk(listed("mbr.raw"), theirs("mbr.raw"), 512);
    EXPECT_EQ(listed("mbr.raw")["partitions"].size(), 5);

    // Sectors of 4096 bytes: sfdisk makes these only on a device that has them.
    shell(R"SH(python3 - <<'PROGRAM'
import struct, uuid, zlib
sector, last = 4096, 16383
entry = uuid.UUID('0fc63daf-8483-4772-8e79-3d69d8477de4').bytes_le + uuid.uuid4().bytes_le
entry += struct.pack('<QQQ', 256, 256 + 2047, 0) + 'x'.encode('utf-16-le').ljust(72, b'\0')
entries = entry.ljust(128 * 128, b'\0')
def header(at, other, first):
    made = struct.pack('<8sIIIIQQQQ16sQIII', b'EFI PART', 65536, 92, 0, 0, at, other, 6, last - 6,
                       uuid.UUID(int=1).bytes_le, first, 128, 128, zlib.crc32(entries))
    return made[:16] + struct.pack('<I', zlib.crc32(made)) + made[20:]
with open('sectors.raw', 'wb') as disk:
    disk.truncate((last + 1) * sector)
    disk.seek(446); disk.write(bytes([0, 0, 2, 0, 0xee, 0, 0, 0, 1, 0, 0, 0, 0xff, 0x3f, 0, 0]))
    disk.seek(510); disk.write(bytes([0x55, 0xaa]))
    disk.seek(sector); disk.write(header(1, last, 2))
    disk.seek(2 * sector); disk.write(entries)
    disk.seek((last - 4) * sector); disk.write(entries)
    disk.seek(last * sector); disk.write(header(last, 1, last - 4))
PROGRAM
)SH");
    EXPECT_EQ(listed("sectors.raw")["sector-size"], 4096);
    EXPECT_EQ(listed("sectors.raw")["partitions"][0]["start"], 1 << 20);
    EXPECT_EQ(listed("sectors.raw")["partitions"][0]["size"], 8 << 20);
    EXPECT_EQ(listed("sectors.raw")["warnings"], json::array());

    // A damaged table is read from its backup. Without that, it is an error.
    const auto whole = listed("gpt.raw");
    shell("printf XXXX | dd of=gpt.raw bs=1 seek=1100 conv=notrunc status=none");
    const auto damaged = tool({"partitions", "--json", "-f", "raw", "gpt.raw"});
    EXPECT_THAT(damaged.err, HasSubstr("read from its backup"));
    EXPECT_EQ(json::parse(damaged.out)["partitions"], whole["partitions"]);
    shell("printf X | dd of=gpt.raw bs=1 seek=$((64*1024*1024-512+20)) conv=notrunc status=none");
    expect_refusal({"partitions", "-f", "raw", "gpt.raw"}, HasSubstr("neither it nor its backup is valid"));

    // A table in a partition is named.
    shell(
        "truncate -s 70M outer.raw; echo 'label: gpt\nstart=2048, type=linux' | sfdisk -q outer.raw; "
        "dd if=mbr.raw of=outer.raw bs=1M seek=1 conv=notrunc status=none");
    EXPECT_EQ(listed("outer.raw")["partitions"][0]["contents"]["type"], "dos");
    EXPECT_THAT(must_tool({"partitions", "-f", "raw", "outer.raw"}).out, HasSubstr("dos partition table"));

    // A chain that leads back to its beginning.
    auto bytes = read_file(directory_ / "mbr.raw");
    const auto start = listed("mbr.raw")["partitions"][1]["start"].get<std::size_t>();
    for (int i = 0; i < 4; ++i) bytes[start + 446 + 16 + 8 + static_cast<std::size_t>(i)] = '\0';
    write_file(directory_ / "mbr.raw", bytes);
    EXPECT_THAT(tool({"partitions", "-f", "raw", "mbr.raw"}).err, HasSubstr("is a loop"));
}

TEST_F(InsideTest, FindsThePartition) {
    make_tree();
    make_ext("root.raw", "-t ext4 -I 256 -L root", "16M");
    shell(R"SH(truncate -s 64M disk.raw; sfdisk -q disk.raw <<<'label: gpt
        start=1M, size=8M, type=uefi
        start=16M, size=16M, type=linux'
        dd if=root.raw of=disk.raw bs=1M seek=16 conv=notrunc status=none)SH");
    must_qemu_img({"convert", "-O", "qcow2", "disk.raw", "disk.qcow2"}, directory_.path());
    EXPECT_EQ(must_tool({"cat", "disk.qcow2:2", "/a/f"}).out, "hello\n");
    EXPECT_EQ(must_tool({"cat", "disk.qcow2", "/a/f"}).out, "hello\n") << "the only partition that is known";
    EXPECT_THAT(must_tool({"info", "disk.qcow2"}).out, HasSubstr("ext4 \"root\""));
    expect_refusal({"ls", "disk.qcow2:1"}, HasSubstr("no file system is known here"));
    expect_refusal({"ls", "disk.qcow2:7"}, HasSubstr("no partition with this number"));
    shell("mkfs.vfat -n EFI --offset 2048 disk.raw 8192 > /dev/null");
    expect_refusal({"ls", "-f", "raw", "disk.raw"}, HasSubstr("1 (vfat EFI), 2 (ext4 root)"));
    must_tool({"put", "-f", "raw", "disk.raw:2", "tree/a/big", "/new"});
    must_tool({"get", "-f", "raw", "disk.raw:2", "/new", "new"});
    EXPECT_EQ(read_file(directory_ / "new"), read_file(directory_ / "tree/a/big"));
    // A name with a colon is the file that has it.
    shell("mv disk.qcow2 disk:2; mv root.raw 3:4");
    EXPECT_THAT(must_tool({"partitions", "disk:2"}).out, HasSubstr("EFI System"));
    EXPECT_EQ(must_tool({"cat", "disk:2:2", "/a/f"}).out, "hello\n");
    EXPECT_EQ(must_tool({"cat", "-f", "raw", "3:4", "/a/f"}).out, "hello\n");
}

/// What is not stored is not read.
TEST_F(InsideTest, LongHolesTakeNoTime) {
    shell(
        "mkdir tree; truncate -s 1T tree/hole; printf x | dd of=tree/hole bs=1 seek=$((1 << 39)) conv=notrunc "
        "status=none; "
        "mke2fs -q -t ext4 -d tree disk.raw 64M");
    shell(std::string("timeout 60 '") + QCOW_TOOL + "' get --tar -f raw disk.raw /hole > hole.tar; tar -xf hole.tar");
    EXPECT_EQ(std::filesystem::file_size(directory_ / "hole"), 1ULL << 40);
    EXPECT_EQ(shell("dd if=hole bs=1 skip=$((1 << 39)) count=2 status=none | od -An -tx1"), " 78 00\n");
}

TEST_F(InsideTest, OneArchiveHoldsAllThatIsNamed) {
    shell("mkdir -p tree/sub; echo a > tree/a; ln tree/a tree/sub/link; echo b > tree/sub/b");
    make_ext("disk.raw", "-t ext4", "4M");
    const std::string tar = std::string("'") + QCOW_TOOL + "' get --tar -f raw disk.raw /a /sub";
    EXPECT_EQ(shell(tar + " | tar -t"), "a\nsub/\nsub/b\nsub/link\n");
    shell("mkdir from-tar out; " + tar + " | tar -C from-tar -x");
    EXPECT_EQ(shell("stat -c %h from-tar/a; cat from-tar/sub/link"), "2\na\n");
    must_tool({"get", "-f", "raw", "disk.raw", "/a", "/sub", "out"});
    EXPECT_EQ(shell("stat -c %h out/a; cat out/sub/link"), "2\na\n");
    // Neither takes the place of the other.
    shell("mkdir tree/other; echo other > tree/other/a");
    make_ext("disk.raw", "-t ext4", "4M");
    expect_refusal({"get", "--tar", "-f", "raw", "disk.raw", "/a", "/other/a"},
                   HasSubstr("/other/a: another file gets the same name in the archive"));
    expect_refusal({"get", "-f", "raw", "disk.raw", "/a", "-"}, HasSubstr("`qcow cat` writes one to it"));
}

TEST_F(InsideTest, FilesWithManyPiecesAreRead) {
    shell(R"SH(mkdir tree; python3 -c "
f = open('tree/pieces', 'wb')
for i in range(33000): f.seek(i * 2048), f.write(b'%1024d' % i)
"
        printf '[filesystem]\ntype = "ext4"\nblock_size = 1024\nsource = "tree"\n' > spec.toml)SH");
    must_tool({"build", "-q", "spec.toml", "-o", "disk.raw"});
    must_tool({"get", "-f", "raw", "disk.raw", "/pieces", "pieces"});
    EXPECT_EQ(shell("cmp pieces tree/pieces && echo same"), "same\n");
    shell(std::string("'") + QCOW_TOOL + "' get --tar -f raw disk.raw /pieces | tar -xO | cmp - tree/pieces");
    // Time that grows with the square of the pieces is some minutes.
    shell(std::string("timeout 60 '") + QCOW_TOOL + "' build -q --fs ext4 disk.raw -o copy.raw");
    EXPECT_EQ(shell("debugfs -R 'cat /pieces' copy.raw 2>/dev/null | cmp - tree/pieces && echo same"), "same\n");
}

/// An inode may hold the first bytes of a file that ends with zeros.
TEST_F(InsideTest, ZerosFollowWhatLiesInAnInode) {
    shell("mkdir tree; truncate -s 2M tree/hole; mke2fs -q -t ext4 -O inline_data -b 2048 -d tree disk.raw 64M");
    must_tool({"get", "-f", "raw", "disk.raw", "/hole", "hole"});
    EXPECT_EQ(shell("cmp hole tree/hole && echo same"), "same\n");
}

/// mkfs.fat makes such a file system if it is told to, and warns.
TEST_F(InsideTest, Fat32MayHaveFewClusters) {
    shell("mkdir tree; printf hello > tree/file; mkfs.fat -F 32 -s 2 -C disk.raw 60000 > /dev/null");
    must_tool({"put", "-f", "raw", "disk.raw", "tree/file", "/"});
    EXPECT_EQ(must_tool({"cat", "-f", "raw", "disk.raw", "/file"}).out, "hello");
}

// ---- Hostile file systems ----

TEST_F(InsideTest, NamesDoNotLeadOut) {
    shell(
        "mkdir -p tree/yyyy outside; ln -s \"$PWD/outside\" tree/xxxx; echo evil > tree/yyyy/file; echo evil > "
        "tree/zzz");
    make_ext("disk.raw", "-t ext2 -O ^dir_index", "4M");
    auto bytes = read_file(directory_ / "disk.raw");
    const auto patch = [&](const std::string& from, const std::string& to) {
        for (auto at = bytes.find(from); at != std::string::npos; at = bytes.find(from, at + 1))
            bytes.replace(at, from.size(), to);
        write_file(directory_ / "disk.raw", bytes);
    };
    patch("yyyy", "xxxx");  // a link that leads out, and then a directory with the same name
    const auto finished = tool({"get", "-f", "raw", "disk.raw", "/", "out"});
    EXPECT_EQ(finished.status, 1) << finished.text();
    EXPECT_EQ(shell("ls outside"), "");
    patch("zzz", "../");
    shell("rm -rf out");
    expect_refusal({"get", "-f", "raw", "disk.raw", "/", "out"}, HasSubstr("which no entry can have"));
    EXPECT_EQ(shell("ls outside"), "");
}

TEST_F(InsideTest, DamageEndsInAnErrorOrAResult) {
    shell(R"SH(mkdir -p tree/sub; cd tree; head -c 100000 /dev/urandom > big; echo hello > sub/file; ln -s sub/file link
        for i in $(seq 40); do echo $i > "sub/name $i"; done; cd ..
        truncate -s 2M ext2.raw ext4.raw fat.raw ntfs.raw
        mke2fs -q -F -t ext2 -d tree ext2.raw; mke2fs -q -F -t ext4 -O ^has_journal,inline_data,^metadata_csum -I 256 -d tree ext4.raw
        mkfs.vfat fat.raw > /dev/null; rm tree/link; mcopy -i fat.raw -s tree/* ::
        mkntfs -q -F ntfs.raw 2>/dev/null; ntfscp -f ntfs.raw tree/big big
        mksquashfs tree squash.raw -quiet -no-progress > /dev/null; truncate -s %512 squash.raw
        xorriso -as mkisofs -quiet -R -o iso.raw tree 2>/dev/null; tar -C tree -cf tar.raw .)SH");
    Random random(20260131);
    for (const auto* const name : {"ext2.raw", "ext4.raw", "fat.raw", "ntfs.raw", "squash.raw", "iso.raw", "tar.raw"}) {
        const auto whole = read_file(directory_ / name);
        // Metadata: what is not zero at the front, and for NTFS in the middle.
        for (unsigned round = 0; round < rounds(25); ++round) {
            auto bytes = whole;
            for (int i = 0; i < 20; ++i) {
                std::size_t at = 0;
                for (int tries = 0; tries < 1000 && (at < 512 || whole[at] == 0); ++tries)
                    at = random.below(whole.size());
                bytes[at] = static_cast<char>(random.below(256));
            }
            write_file(directory_ / "damaged", bytes);
            for (const Arguments& command :
                 {Arguments{"tree", "-f", "raw", "damaged"}, {"get", "-f", "raw", "damaged", "/", "out"}}) {
                const auto finished = tool(command);
                EXPECT_LE(finished.status, 1) << name << " round " << round << ": " << finished.text();
            }
            std::filesystem::remove_all(directory_ / "out");
        }
    }
}

}  // namespace
}  // namespace qcow::test
