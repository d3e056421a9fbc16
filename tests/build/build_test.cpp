// Disks that are built, held against the trees that they are from by the programs that own the formats.

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "support/loop_device.h"
#include "support/random.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
namespace fs = std::filesystem;

class BuildTest : public ToolTest {
protected:
    void SetUp() override {}

    [[nodiscard]] std::string path(const std::string& name) const { return directory_.file(name); }

    void put(const std::string& name, const std::string& contents) const {
        fs::create_directories(fs::path(path(name)).parent_path());
        write_file(path(name), contents);
        set_time(name, 1600000000);
    }

    void set_time(const std::string& name, std::int64_t seconds) const {
        const timespec times[2] = {{seconds, 0}, {seconds, 123456789}};
        utimensat(AT_FDCWD, path(name).c_str(), times, AT_SYMLINK_NOFOLLOW);
    }

    /// Files of every kind that a user can make, in this order or the reverse.
    void make_tree(const std::string& name, bool reversed = false) const {
        fs::create_directories(path(name));
        std::vector<std::function<void()>> makers;
        const auto at = [&](const std::string& file) { return name + "/" + file; };
        makers.emplace_back([&] { put(at("empty"), ""); });
        makers.emplace_back([&] { put(at("small"), "small\n"); });
        makers.emplace_back([&] { put(at("large"), random_text(3'000'000)); });
        makers.emplace_back([&] { put(at("a directory/with a long name " + std::string(200, 'x')), "long"); });
        makers.emplace_back([&] { put(at("deep/1/2/3/4/5/6/7/8/9/file"), "deep"); });
        makers.emplace_back([&] {
            fs::create_directories(path(at("many")));
            for (int i = 0; i < 3000; ++i) put(at("many/entry number " + std::to_string(i)), "");
        });
        makers.emplace_back([&] {
            put(at("linked"), "linked");
            fs::create_directories(path(at("links")));
            fs::create_hard_link(path(at("linked")), path(at("links/again")));
        });
        makers.emplace_back([&] {
            fs::create_symlink("small", path(at("symlink")));
            fs::create_symlink(std::string(150, 'y') + "/" + std::string(150, 'y'), path(at("long symlink")));
            fs::create_symlink(".", path(at("loop")));
        });
        makers.emplace_back([&] { mkfifo(path(at("fifo")).c_str(), 0640); });
        makers.emplace_back([&] {
            write_file(path(at("sparse")), "front");
            truncate(path(at("sparse")).c_str(), 50'000'000);
            const int fd = open(path(at("sparse")).c_str(), O_WRONLY | O_CLOEXEC);
            EXPECT_EQ(pwrite(fd, "middle", 6, 20'000'000), 6);
            close(fd);
        });
        if (reversed) std::ranges::reverse(makers);
        for (const auto& make : makers) make();
        chmod(path(at("small")).c_str(), 04751);
        set_time(at("sparse"), 1500000000);
        for (auto entry = fs::recursive_directory_iterator(path(name)); entry != fs::recursive_directory_iterator();
             ++entry)
            set_time(entry->path().lexically_relative(directory_.path()).string(), 1600000001);
        set_time(name, 1600000002);
    }

    static std::string random_text(std::size_t bytes) {
        Random random(7);
        std::string text(bytes, '\0');
        for (auto& c : text) c = static_cast<char>(random.below(256));
        return text;
    }

    void expect_success(const std::vector<std::string>& command) const {
        const auto finished = run(command, directory_.path());
        EXPECT_EQ(finished.status, 0) << finished.text();
    }

    void expect_sound_ext(const std::string& image) const { expect_success({"e2fsck", "-fn", path(image)}); }

    /// Compares the file system with the tree: mounted where that is possible, and taken out by debugfs elsewhere.
    void expect_same_files(const std::string& image, const std::string& tree) const {
        fs::create_directories(path("mnt"));
        const bool mounted =
            geteuid() == 0 && run({"mount", "-o", "loop,ro", path(image), path("mnt")}, directory_.path()).status == 0;
        if (!mounted) {
            fs::remove_all(path("mnt"));
            fs::create_directories(path("mnt"));
            must_run({"debugfs", "-R", "rdump / " + path("mnt"), path(image)}, directory_.path());
        }
        const auto differences = mounted ? run({"rsync", "-aHAXnc", "--delete", "--exclude=/lost+found",
                                                "--itemize-changes", path(tree) + "/", path("mnt") + "/"},
                                               directory_.path())
                                         : run({"diff", "-r", "--no-dereference", "--exclude=lost+found",
                                                "--exclude=fifo", path(tree), path("mnt")},
                                               directory_.path());
        EXPECT_EQ(differences.out, "") << differences.text();
        EXPECT_EQ(differences.status, 0) << differences.text();
        if (mounted) must_run({"umount", path("mnt")}, directory_.path());
    }

    void write_spec(const std::string& text) const { write_file(path("disk.toml"), text); }
};

TEST_F(BuildTest, ExtHoldsTheTree) {
    make_tree("tree");
    if (setxattr(path("tree/small").c_str(), "user.note", "kept", 4, 0) == 0)
        setxattr(path("tree/many").c_str(), "user.big", std::string(1500, 'v').data(), 1500, 0);
    for (const auto* type : {"ext2", "ext3", "ext4"}) {
        SCOPED_TRACE(type);
        must_tool({"build", "--fs", type, "tree", "-o", "disk.raw"});
        expect_sound_ext("disk.raw");
        expect_same_files("disk.raw", "tree");
    }
}

TEST_F(BuildTest, ExtHasAllBlockSizesAndSizes) {
    make_tree("tree");
    for (const auto* block_size : {"1024", "2048", "4096"}) {
        for (const auto* type : {"ext2", "ext4"}) {
            SCOPED_TRACE(std::string(type) + " " + block_size);
            write_spec(std::string("[image]\nsize = \"200MiB\"\n[filesystem]\ntype = \"") + type +
                       "\"\nsource = \"tree\"\nblock_size = " + block_size);
            must_tool({"build", "disk.toml", "-o", "disk.raw"});
            EXPECT_EQ(fs::file_size(path("disk.raw")), 200U << 20);
            expect_sound_ext("disk.raw");
            expect_same_files("disk.raw", "tree");
        }
    }
}

TEST_F(BuildTest, AnEmptyFileSystemIsSound) {
    for (const auto* type : {"ext2", "ext3", "ext4"}) {
        write_spec(std::string("[filesystem]\ntype = \"") + type + "\"\nsize = \"64MiB\"\nlabel = \"empty\"");
        must_tool({"build", "disk.toml", "-o", "disk.raw"});
        expect_sound_ext("disk.raw");
        const auto described = must_run({"dumpe2fs", "-h", path("disk.raw")}).out;
        EXPECT_THAT(described, HasSubstr("empty"));
        // Not what the characters of this machine are like.
        EXPECT_THAT(described, AllOf(HasSubstr("unsigned_directory_hash"), Not(HasSubstr(" signed_directory_hash"))));
    }
}

TEST_F(BuildTest, ExtHasOptions) {
    put("tree/file", random_text(500'000));
    const auto build = [&](const std::string& options, const std::string& size) {
        write_spec(size + "[filesystem]\ntype = \"ext4\"\nsource = \"tree\"\noptions = { " + options + " }\n");
        must_tool({"build", "disk.toml", "-o", "disk.raw"});
        expect_sound_ext("disk.raw");
    };
    for (const auto* options :
         {"flex_bg = false", "extents = false", "\"64bit\" = \"off\"", "inode_size = 128", "sparse_super2 = true",
          "metadata_csum = false, uninit_bg = true", "dir_index = false", "resize_inode = false",
          "reserved_percent = 5", "metadata_csum_seed = true", "journal_blocks = 2048"}) {
        SCOPED_TRACE(options);
        build(options, "[image]\nsize = \"150MiB\"\n");
    }
    build("inodes = 100000", "");  // more than the groups of a small file system have
    write_spec("[filesystem]\ntype = \"ext4\"\noptions = { metadata_csums = true }\n");
    expect_refusal({"build", "disk.toml", "-o", "disk.raw"}, HasSubstr("did you mean \"metadata_csum\"?"));
}

TEST_F(BuildTest, TheSameTreeGivesTheSameBytes) {
    make_tree("one");
    make_tree("two", true);
    must_tool({"build", "--fs", "ext4", "one", "-o", "one.raw", "-m", "1"});
    must_tool({"build", "--fs", "ext4", "two", "-o", "two.raw", "-m", "4"});
    EXPECT_TRUE(bytes_of("one.raw") == bytes_of("two.raw"));
    must_tool({"build", "--fs", "ext4", "one", "-o", "one.qcow2", "-c", "-m", "1"});
    must_tool({"build", "--fs", "ext4", "two", "-o", "two.qcow2", "-c", "-m", "4"});
    EXPECT_TRUE(bytes_of("one.qcow2") == bytes_of("two.qcow2"));
    expect_success({"qemu-img", "check", path("one.qcow2")});
    expect_success({"qemu-img", "compare", path("one.qcow2"), path("one.raw")});
    // Without fifos and links, FAT holds it, too.
    for (const auto* tree : {"one", "two"}) {
        for (const auto* name : {"fifo", "symlink", "long symlink", "loop"}) fs::remove(path(tree) + "/" + name);
        set_time(tree, 1600000002);  // the trees are the same in this, too
    }
    must_tool({"build", "--fs", "vfat", "one", "-o", "one.fat"});
    must_tool({"build", "--fs", "vfat", "two", "-o", "two.fat"});
    EXPECT_TRUE(bytes_of("one.fat") == bytes_of("two.fat"));
}

TEST_F(BuildTest, TheTimeOfTheBuildLimitsTimes) {
    put("tree/file", "x");
    const auto built =
        run({"env", "SOURCE_DATE_EPOCH=1000000000", QCOW_TOOL, "build", "--fs", "ext4", "tree", "-o", "disk.raw"},
            directory_.path());
    EXPECT_EQ(built.status, 0) << built.text();
    const auto stat = must_run({"debugfs", "-R", "stat /file", path("disk.raw")}).out;
    EXPECT_THAT(stat, HasSubstr("mtime: 0x3b9aca00"));
    expect_sound_ext("disk.raw");
}

TEST_F(BuildTest, FatHoldsTheTree) {
    put("tree/README.TXT", "short name");
    put("tree/a file with a long name.text", "long name");
    put("tree/a file with a long name too.text", "long name too");
    put("tree/EFI/BOOT/BOOTX64.EFI", random_text(300'000));
    put("tree/\xc3\xbcmlaut", "wide");
    put("tree/empty", "");
    for (int i = 0; i < 300; ++i) put("tree/many/file number " + std::to_string(i), std::to_string(i));
    for (const auto& [type, size] : {std::pair{"fat12", "8M"}, {"fat16", "64M"}, {"fat32", "64M"}, {"vfat", ""}}) {
        SCOPED_TRACE(type);
        Arguments arguments = {"build", "--fs", type, "tree", "-o", "disk.raw", "--label", "esp"};
        if (*size != '\0') arguments.insert(arguments.end(), {"--size", size});
        must_tool(arguments);
        expect_success({"fsck.fat", "-n", path("disk.raw")});
        fs::remove_all(path("out"));
        fs::create_directories(path("out"));
        const auto copied = run({"env", "LC_ALL=C.UTF-8", "mcopy", "-s", "-i", path("disk.raw"), "::*", path("out")});
        EXPECT_EQ(copied.status, 0) << copied.text();
        expect_success({"diff", "-r", path("tree"), path("out")});
        EXPECT_THAT(must_run({"mdir", "-i", path("disk.raw"), "::"}).out, HasSubstr("ESP"));
    }
}

TEST_F(BuildTest, ErrorsBehindTheTextNameTheKey) {
    put("tree/f", "1");
    const std::string root = "[image]\nsize = \"8MiB\"\n[[partitions]]\nsize = \"2MiB\"\n[partitions.filesystem]\n";
    const auto refused = [&](const std::string& text, const std::string& message) {
        put("disk.toml", text);
        expect_refusal({"build", "disk.toml", "-o", "disk.raw"}, HasSubstr("disk.toml:" + message));
        EXPECT_FALSE(fs::exists(path("disk.raw")));
    };
    refused(root + "type = \"ext4\"\nsource = \"absent\"", "7:10: partition 1: absent: ");
    refused(root + "type = \"ext4\"\nsource = [\"tree\", \"absent\"]", "7:19: partition 1: absent: ");
    refused(root + "type = \"ext4\"\nlabel = \"longer than that is\"", "7:9: partition 1: the label is longer");
    refused(root + "type = \"vfat\"\nvolume_label = \"a?\"", "7:16: partition 1: FAT has no labels");
    refused(root + "type = \"ext4\"\noptions = { inodes = 20, inode_size = 300 }", "7:39: partition 1: option inode");
    refused(root + "type = \"ext4\"\nfiles = [{ path = \"/x\", mode = 0o644 }]", "7:10: partition 1: /x: ");
    refused(root + "type = \"swap\"\n[[partitions]]\nsize = \"7MiB\"", "8:8: partition 2: No space");
    refused(root + "type = \"swap\"\n[[partitions]]\nsize = \"1MiB\"\noffset = \"2MiB\"",
            "9:10: partition 2: its offset");
    refused("[image]\nsize = 1000000\n[[partitions]]\nsize = 4096", "2:8: the size of the disk");
    refused("[[partitions]]\n[partitions.filesystem]\ntype = \"swap\"", "1:1: partition 1: swap wants a size");
    put("tree/large", std::string(3 << 20, 'x'));
    refused(root + "type = \"ext4\"\nsource = \"tree\"", "4:8: partition 1: No space: the tree needs");
    refused(root + "type = \"vfat\"\nsource = \"tree\"", "4:8: partition 1: No space: the tree needs");
    put("tree/con", "");
    refused(root + "type = \"vfat\"\nsource = \"tree\"", "7:10: partition 1: /con: ");
}

TEST_F(BuildTest, FatRefusesWhatItCannotHold) {
    const auto refused = [&](const std::string& what) {
        expect_refusal({"build", "--fs", "vfat", "tree", "-o", "disk.raw"}, HasSubstr(what));
        EXPECT_FALSE(fs::exists(path("disk.raw")));
        fs::remove_all(path("tree"));
    };
    put("tree/what?", "");
    refused("/what?: FAT has no names with the character \"?\"");
    put("tree/dir/end.", "");
    refused("end with a dot");
    put("tree/A", "");
    put("tree/a", "");
    refused("differs only in case");
    fs::create_directories(path("tree"));
    fs::create_symlink("a", path("tree/link"));
    refused("/link: FAT holds only regular files and directories");
    put("tree/\xff", "");
    refused("no valid UTF-8");
}

TEST_F(BuildTest, WhatDoesNotFitIsSaidBeforeAnythingIsWritten) {
    put("tree/large", random_text(8'000'000));
    for (const auto* type : {"ext4", "ext2", "vfat"}) {
        expect_refusal({"build", "--fs", type, "tree", "-o", "disk.raw", "--size", "6M"},
                       AllOf(HasSubstr("No space: the tree needs "), HasSubstr("bytes, and there is room for ")));
        EXPECT_FALSE(fs::exists(path("disk.raw")));
    }
}

TEST_F(BuildTest, PartitionTablesAreSound) {
    put("boot/vmlinuz", random_text(100'000));
    make_tree("root");
    for (const auto* table : {"gpt", "mbr"}) {
        SCOPED_TRACE(table);
        write_spec(std::string("[image]\npartition_table = \"") + table +
                   "\"\nsize = \"256MiB\"\n"
                   "[[partitions]]\nname = \"EFI\"\ntype = \"esp\"\nsize = \"16MiB\"\n"
                   "[partitions.filesystem]\ntype = \"vfat\"\nsource = \"boot\"\n"
                   "[[partitions]]\nname = \"swap\"\ntype = \"swap\"\nsize = \"8MiB\"\n"
                   "[partitions.filesystem]\ntype = \"swap\"\nlabel = \"swp\"\n"
                   "[[partitions]]\nname = \"fitted\"\ntype = \"linux\"\n"
                   "[partitions.filesystem]\ntype = \"ext4\"\nsource = \"root\"\nfree = \"5MiB\"\n"
                   "[[partitions]]\nname = \"rest\"\ntype = \"linux\"\nsize = \"remaining\"\nbootable = true\n"
                   "[partitions.filesystem]\ntype = \"ext3\"\n");
        const auto report = json::parse(must_tool({"build", "disk.toml", "-o", "disk.raw", "--json"}).out);
        EXPECT_EQ(fs::file_size(path("disk.raw")), 256U << 20);
        const auto verified = must_run({"sfdisk", "--verify", path("disk.raw")});
        EXPECT_THAT(verified.out, HasSubstr("No errors detected"));
        EXPECT_EQ(verified.err, "");
        if (table == std::string("gpt")) {
            EXPECT_THAT(must_run({"sgdisk", "-v", path("disk.raw")}).out, HasSubstr("No problems found"));
        }
        const auto partitions =
            json::parse(must_run({"sfdisk", "--json", path("disk.raw")}).out)["partitiontable"]["partitions"];
        ASSERT_EQ(partitions.size(), 4U);
        const std::vector<std::string> types = {"vfat", "swap", "ext4", "ext3"};
        for (std::size_t i = 0; i < partitions.size(); ++i) {
            const auto start = partitions[i]["start"].get<std::uint64_t>();
            EXPECT_EQ(start * 512, report["parts"][i]["offset"]);
            EXPECT_EQ(partitions[i]["size"].get<std::uint64_t>() * 512, report["parts"][i]["size"]);
            must_run({"dd", "if=" + path("disk.raw"), "of=" + path("part.raw"), "bs=512",
                      "skip=" + std::to_string(start),
                      "count=" + std::to_string(partitions[i]["size"].get<std::uint64_t>()), "status=none"});
            EXPECT_EQ(must_run({"blkid", "-p", "-o", "value", "-s", "TYPE", path("part.raw")}).out, types[i] + "\n");
            if (types[i] == "vfat") expect_success({"fsck.fat", "-n", path("part.raw")});
            if (types[i].starts_with("ext")) expect_sound_ext("part.raw");
        }
    }
}

TEST_F(BuildTest, DisksWithSectorsOf4096BytesAreBuilt) {
    put("boot/file", "x");
    write_spec(
        "[image]\nsector_size = 4096\n"
        "[[partitions]]\ntype = \"esp\"\nsize = \"300MiB\"\n"
        "[partitions.filesystem]\ntype = \"fat32\"\nsource = \"boot\"\n");
    must_tool({"build", "disk.toml", "-o", "disk.raw"});
    const auto bytes = bytes_of("disk.raw");
    EXPECT_EQ(bytes.substr(4096, 8), "EFI PART");
    EXPECT_EQ(bytes.substr(bytes.size() - 4096, 8), "EFI PART");
    put("part.raw", bytes.substr(1 << 20, 300 << 20));
    expect_success({"fsck.fat", "-n", path("part.raw")});
}

/// A file with many holes needs tables: extents or indirect blocks.
TEST_F(BuildTest, FilesWithManyHolesFit) {
    put("tree/holes", "");
    const int file = open(path("tree/holes").c_str(), O_WRONLY | O_CLOEXEC);
    const std::string piece(4096, 'p');
    for (int i = 0; i < 6000; ++i) EXPECT_EQ(pwrite(file, piece.data(), piece.size(), 12'288L * i), 4096);
    close(file);
    for (const auto* const kind : {"ext2", "ext3", "ext4"}) {
        SCOPED_TRACE(kind);
        must_tool({"build", "--fs", kind, "tree", "-o", "fitted.raw"});
        EXPECT_LT(fs::file_size(path("fitted.raw")), 40'000'000U);
        expect_sound_ext("fitted.raw");
        expect_same_files("fitted.raw", "tree");
    }
}

TEST_F(BuildTest, WhatExtCannotHoldIsRefused) {
    must_run({"python3", "-c",
              "import tarfile\n"
              "link = tarfile.TarInfo('link'); link.type = tarfile.SYMTYPE\n"
              "tarfile.open('link.tar', 'w').addfile(link)\n"
              "file = tarfile.TarInfo('file'); file.pax_headers = {'SCHILY.xattr.user.large': 'v' * 5000}\n"
              "tarfile.open('file.tar', 'w', format=tarfile.PAX_FORMAT).addfile(file)"},
             directory_.path());
    expect_refusal({"build", "--fs", "ext4", "link.tar", "-o", "disk.raw"},
                   AllOf(HasSubstr("/link"), HasSubstr("has no target")));
    expect_refusal({"build", "--fs", "ext4", "file.tar", "-o", "disk.raw"},
                   AllOf(HasSubstr("/file: "), HasSubstr("user.large has 5000 bytes")));
}

TEST_F(BuildTest, AnOverlayHoldsOnlyWhatDiffers) {
    put("tree/large", random_text(20'000'000));
    must_tool({"build", "--fs", "ext4", "tree", "-o", "base.qcow2", "--free", "20M"});
    put("tree/z-new", "new");
    must_tool({"build", "--fs", "ext4", "tree", "-o", "top.qcow2", "-B", "base.qcow2", "-F", "qcow2"});
    EXPECT_LT(fs::file_size(path("top.qcow2")), 2'000'000U);
    must_tool({"convert", "top.qcow2", "top.raw"});
    expect_sound_ext("top.raw");
    expect_same_files("top.raw", "tree");
}

TEST_F(BuildTest, ArchivesAreSourcesAndLayers) {
    make_tree("tree");
    put("upper/small", "changed");
    put("upper/.wh.large", "");
    put("upper/many/.wh..wh..opq", "");
    put("upper/many/only", "this");
    expect_success({"tar", "-C", path("tree"), "--sparse", "-czf", path("tree.tar.gz"), "."});
    must_tool({"build", "--fs", "ext4", "tree.tar.gz", "-o", "disk.raw"});
    expect_sound_ext("disk.raw");
    const auto list = [&](const std::string& at) {
        return must_run({"debugfs", "-R", "ls -p " + at, path("disk.raw")}).out;
    };
    EXPECT_THAT(list("/"), AllOf(HasSubstr("/large/"), HasSubstr("/fifo/")));
    expect_success({"tar", "-C", path("upper"), "-cf", path("upper.tar"), "."});
    must_tool({"build", "--fs", "ext4", "tree.tar.gz", "upper.tar", "-o", "disk.raw"});
    expect_sound_ext("disk.raw");
    EXPECT_THAT(list("/"), AllOf(testing::Not(HasSubstr("/large/")), testing::Not(HasSubstr(".wh."))));
    EXPECT_EQ(must_run({"debugfs", "-R", "cat /small", path("disk.raw")}).out, "changed");
    EXPECT_THAT(list("/many"), AllOf(HasSubstr("/only/"), testing::Not(HasSubstr("entry number"))));
}

TEST_F(BuildTest, ArchivesDoNotLeadOutOfTheTree) {
    put("tree/file", "x");
    expect_success({"tar", "-Pcf", path("absolute.tar"), path("tree/file")});
    expect_refusal({"build", "--fs", "ext4", "absolute.tar", "-o", "disk.raw"}, HasSubstr("absolute path"));
    expect_success({"tar", "-C", path("tree"), "-Pcf", path("up.tar"), "--transform=s,^,../,", "file"});
    expect_refusal({"build", "--fs", "ext4", "up.tar", "-o", "disk.raw"}, HasSubstr("lead out of the tree"));
    put("broken.tar.gz", std::string("\x1f\x8b\x08", 3) + std::string(600, 'x'));
    expect_refusal({"build", "--fs", "ext4", "broken.tar.gz", "-o", "disk.raw"}, HasSubstr("is no tar archive"));
}

TEST_F(BuildTest, FilesOfTheSpecificationAreAddedAndChanged) {
    put("tree/old", "old");
    put("tree/gone/file", "gone");
    put("kernel", random_text(5000));
    write_spec(
        "[filesystem]\ntype = \"ext4\"\nsource = \"tree\"\nowner = \"root\"\nrootdevs = \"minimal\"\nmtime = 5\n"
        "files = [\n"
        "{ path = \"/old\", mode = \"0600\", uid = 7, gid = 70000 },\n"
        "{ path = \"gone\", type = \"remove\" },\n"
        "{ path = \"/etc/hostname\", content = \"box\\n\" },\n"
        "{ path = \"/boot/kernel\", source = \"kernel\" },\n"
        "{ path = \"/boot/same\", type = \"hardlink\", target = \"/boot/kernel\" },\n"
        "{ path = \"/bin\", target = \"usr/bin\" },\n"
        "{ path = \"/var/tmp\", type = \"directory\", mode = \"1777\" },\n"
        "{ path = \"/dev/high\", type = \"block-device\", major = 300, minor = 70000 },\n"
        "]\n");
    must_tool({"build", "disk.toml", "-o", "disk.raw"});
    expect_sound_ext("disk.raw");
    const auto stat = [&](const std::string& file) {
        return must_run({"debugfs", "-R", "stat " + file, path("disk.raw")}).out;
    };
    EXPECT_THAT(stat("/old"), AllOf(HasSubstr("Mode:  0600"), HasSubstr("User:     7"), HasSubstr("Group: 70000")));
    EXPECT_THAT(stat("/boot/same"), HasSubstr("Links: 2"));
    EXPECT_THAT(stat("/bin"), HasSubstr("usr/bin"));
    EXPECT_THAT(stat("/var/tmp"), AllOf(HasSubstr("Mode:  01777"), HasSubstr("mtime: 0x00000005")));
    EXPECT_THAT(stat("/dev/null"), HasSubstr("character special"));
    EXPECT_THAT(stat("/dev/high"), HasSubstr("(New-style) Device major/minor number: 300:70000"));
    EXPECT_EQ(must_run({"debugfs", "-R", "cat /etc/hostname", path("disk.raw")}).out, "box\n");
    write_spec("[filesystem]\ntype = \"ext4\"\nfiles = [{ path = \"/nothing\", mode = \"0600\" }]");
    expect_refusal({"build", "disk.toml", "-o", "disk.raw"}, HasSubstr("/nothing: no source has it"));
}

TEST_F(BuildTest, ARawPartitionHoldsAnImage) {
    put("data", random_text(100'000));
    must_qemu_img({"convert", "-f", "raw", "-O", "qcow2", "data", "data.qcow2"}, directory_.path());
    write_spec(
        "[[partitions]]\ntype = \"bios-boot\"\n[partitions.filesystem]\ntype = \"raw\"\nsource = \"data.qcow2\"\n");
    must_tool({"build", "disk.toml", "-o", "disk.raw"});
    EXPECT_TRUE(bytes_of("disk.raw").substr(1 << 20, 100'000) == bytes_of("data"));
    expect_success({"sgdisk", "-v", path("disk.raw")});
}

TEST_F(BuildTest, APartitionOfAnImageIsASource) {
    make_tree("tree");
    put("boot/kernel", random_text(200'000));
    write_spec(
        "[[partitions]]\ntype = \"esp\"\n[partitions.filesystem]\ntype = \"vfat\"\nsource = \"boot\"\n"
        "[[partitions]]\n[partitions.filesystem]\ntype = \"ext4\"\nsource = \"tree\"\n");
    must_tool({"build", "disk.toml", "-o", "disk.qcow2", "-c"});
    must_tool({"build", "--fs", "ext4", "tree", "-o", "direct.raw"});
    must_tool({"build", "--fs", "ext4", "disk.qcow2:2", "-o", "copied.raw"});
    EXPECT_TRUE(bytes_of("direct.raw") == bytes_of("copied.raw"));
    must_tool({"build", "--fs", "ext2", "disk.qcow2:1", "-o", "copied.raw"});
    expect_sound_ext("copied.raw");
    EXPECT_EQ(must_run({"debugfs", "-R", "cat /kernel", path("copied.raw")}).out, bytes_of("boot/kernel"));
    expect_refusal({"build", "--fs", "ext2", "disk.qcow2:3", "-o", "copied.raw"}, HasSubstr("no partition"));
}

TEST_F(BuildTest, NamesOfTargetsMayHaveAScheme) {
    put("tree/file", "x");
    must_tool({"build", "--fs", "ext4", "tree", "-o", "file:disk.raw"});
    expect_sound_ext("disk.raw");
    EXPECT_FALSE(fs::exists(path("file:disk.raw")));
}

TEST_F(BuildTest, SpecificationsAreReadUpToALimit) {
    expect_refusal({"build", "/dev/zero", "-o", "disk.raw"}, HasSubstr("longer than 16 MiB"));
    const auto piped = run({"bash", "-c", "yes | '" QCOW_TOOL "' build /dev/stdin -o disk.raw"}, directory_.path());
    EXPECT_THAT(piped.err, HasSubstr("longer than 16 MiB"));
    const auto given =
        run({"bash", "-c",
             "printf '[filesystem]\ntype=\"ext4\"\n' | '" QCOW_TOOL "' build /dev/stdin --directory . -o disk.raw"},
            directory_.path());
    EXPECT_EQ(given.status, 0) << given.text();
}

TEST_F(BuildTest, EncryptedDisksAreBuiltAndAreSources) {
    put("tree/file", "x");
    put("key", "secret");
    must_tool({"build", "--fs", "ext4", "tree", "-o", "disk.qcow2", "--option",
               "encrypt.format=luks,encrypt.iter-time=10", "--key", "key"});
    must_tool({"convert", "disk.qcow2", "plain.raw", "--key", "key"});
    EXPECT_EQ(must_run({"debugfs", "-R", "cat /file", path("plain.raw")}).out, "x");
    must_tool({"build", "--fs", "ext2", "disk.qcow2", "-o", "copy.raw", "--key", "key"});
    EXPECT_EQ(must_tool({"cat", "copy.raw", "/file"}).out, "x");
    must_tool({"build", "--fs", "ext4", "tree", "-o", "disk.qcow2", "--option",
               "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10", "--object", "secret,id=k,file=key"});
}

TEST_F(BuildTest, ADeviceInUseIsNotWritten) {
    const LoopDevice device(16 << 20);
    if (!device.obstacle().empty()) GTEST_SKIP() << device.obstacle();
    put("tree/file", "x");
    const auto& name = device.path();
    must_run({"mke2fs", "-q", "-F", "-t", "ext4", name});
    fs::create_directories(path("mnt"));
    must_run({"mount", "-o", "ro", name, path("mnt")});
    const auto before = must_run({"sha256sum", name}).out;
    put("new", "new");
    for (const Arguments& command : {Arguments{"build", "--fs", "ext4", "tree", "-o", name},
                                     {"convert", "new", name},
                                     {"create", name, "1M"},
                                     {"put", "-f", "raw", name, "new", "/"},
                                     {"write", "-f", "raw", name, "0"}})
        expect_refusal(command, HasSubstr(name + ": the device is in use"));
    EXPECT_EQ(must_run({"sha256sum", name}).out, before);
    must_run({"umount", path("mnt")});
    must_tool({"put", "-f", "raw", name, "new", "/"});
    must_tool({"build", "--fs", "ext4", "tree", "-o", name});
    expect_success({"e2fsck", "-fn", name});
}

TEST_F(BuildTest, ClosedStandardStreamsDoNotLeadIntoImages) {
    put("tree/file", "x");
    must_tool({"build", "--fs", "ext4", "tree", "-o", "plain.raw"});
    const auto shell = [&](const std::string& script) {
        return run({"bash", "-c", "qcow='" QCOW_TOOL "'; " + script}, directory_.path());
    };
    shell("$qcow build -p --fs ext4 tree -o disk.raw <&- >&- 2>&-");
    EXPECT_TRUE(bytes_of("disk.raw") == bytes_of("plain.raw"));
    for (const auto* closed : {"2>&-", "2>/dev/full"}) {
        fs::remove(path("disk.raw"));
        EXPECT_EQ(shell(std::string("$qcow build -q -p --fs ext4 tree -o disk.raw ") + closed).status, 0);
        EXPECT_TRUE(bytes_of("disk.raw") == bytes_of("plain.raw"));
        EXPECT_EQ(shell(std::string("$qcow convert -p plain.raw disk.raw ") + closed).status, 0);
        // Warns that the format is guessed.
        EXPECT_EQ(shell(std::string("$qcow resize disk.raw +1M ") + closed).status, 0);
        EXPECT_TRUE(bytes_of("disk.raw").substr(0, 1024) == std::string(1024, '\0'));
        EXPECT_EQ(shell(std::string("$qcow mkdir disk.raw /x ") + closed).status, 0);
        expect_sound_ext("disk.raw");
    }
    EXPECT_EQ(shell("$qcow info plain.raw >&-").status, 1);
}

TEST_F(BuildTest, SourcesAreNotOverwritten) {
    put("tree/file", "x");
    expect_success({"tar", "-C", path("tree"), "-cf", path("tree.tar"), "."});
    expect_refusal({"build", "--fs", "ext4", "tree.tar", "-o", "tree.tar"}, HasSubstr("source"));
    expect_refusal({"build", "--fs", "ext4", "tree", "-o", "tree/file"}, HasSubstr("overwrite a file of the source"));
    fs::create_symlink("tree/file", path("link"));
    expect_refusal({"build", "--fs", "ext4", "tree", "-o", "link"}, HasSubstr("overwrite a file of the source"));
    EXPECT_EQ(bytes_of("tree/file"), "x");
    const std::string spec = "[image]\nboot_code = \"boot\"\n[[partitions]]\nsize = \"1MiB\"\n";
    write_spec(spec);
    put("boot", "CODE");
    expect_refusal({"build", "disk.toml", "-o", "disk.toml"}, HasSubstr("would overwrite an input"));
    expect_refusal({"build", "disk.toml", "-o", "boot"}, HasSubstr("would overwrite the boot code"));
    EXPECT_EQ(bytes_of("disk.toml") + bytes_of("boot"), spec + "CODE");
    expect_refusal({"build", "tree", "-o", "disk.raw"}, HasSubstr("use --fs ext4"));
    expect_refusal({"build", "none.toml", "-o", "disk.raw"}, HasSubstr("no such specification"));
    expect_refusal({"build", "--fs", "ext4", "none", "-o", "disk.raw"}, HasSubstr("there is no such directory"));
    expect_refusal({"build", "--fs", "ext4", "tree", "-o", "disk.raw", "-c"}, HasSubstr("raw has no compression"));
}

}  // namespace
}  // namespace qcow::test
