// ext file systems that are changed in place. e2fsck judges them.

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/bits.h"
#include "build/changed_disk.h"
#include "support/effort.h"

namespace qcow::test {
namespace {

class ExtChangeTest : public ChangedDiskTest {
protected:
    /// A file system with old files, in memory.
    [[nodiscard]] Files made(const std::string& options, const std::string& size) const {
        return made_by(fmt::format(R"SH(rm -rf disk.raw tree; mkdir -p tree/dir
            head -c 5000 /dev/zero | tr '\0' k > tree/keep; head -c 9000 /dev/zero | tr '\0' o > tree/value
            cp tree/keep tree/dir/old; cp tree/keep "tree/dir/a long name"
            mke2fs -q -d tree {} disk.raw {})SH",
                                   options, size));
    }

    static void change(Disk& disk) {
        auto files = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
        const auto deeper = replace_and_remove(*files, "old", "deeper");
        for (int i = 0; i < 80; ++i) {
            put(*files, deeper, fmt::format("file number {:0100}", i), std::string(700, 'x'));
            must(files->create(deeper, fmt::format("directory number {:0100}", i), node(FileType::directory)));
        }
        must(files->close());
    }

    /// What e2fsck finds.
    [[nodiscard]] std::string faults() const {
        const auto checked = run({"e2fsck", "-fn", disk_name}, directory_.path());
        return checked.status == 0 ? "" : checked.text();
    }
};

const std::vector<std::string> ext_kinds = {"-t ext2 -b 1024", "-t ext4", "-t ext4 -O ^metadata_csum,^64bit -b 1024"};

TEST_F(ExtChangeTest, EveryKindIsSoundAfterwards) {
    for (const auto& options : ext_kinds) {
        SCOPED_TRACE(options);
        const auto files = made(options, "8M");
        StorageDisk disk(files.at(disk_name));
        change(disk);
        save(files, directory_.path());
        EXPECT_EQ(faults(), "");
        EXPECT_EQ(shell("debugfs -R 'cat /value' disk.raw 2>/dev/null"), std::string(12'000, 'n'));
    }
}

/// Before the first change, the disk says that it is not clean. So nobody takes half of a change for a whole one, and
/// e2fsck mends it. Files that did not change are as they were, and one that was replaced is the old or the new one.
TEST_F(ExtChangeTest, APowerLossIsKnown) {
    for (const auto& options : ext_kinds) {
        unsigned refused = 0;
        // A block arrives as a whole.
        lose_power(made(options, "8M"), "ext " + options, 8, 8, change, [&](const Files& crashed) {
            if (!open_file_system(std::make_shared<StorageDisk>(crashed.at(disk_name)), Access::write)) {
                ++refused;
                EXPECT_LE(run({"e2fsck", "-fy", disk_name}, directory_.path()).status, 1);
            }
            ASSERT_EQ(faults(), "");
            EXPECT_EQ(shell("debugfs -R 'cat \"/dir/a long name\"' disk.raw 2>/dev/null"), std::string(5000, 'k'));
            EXPECT_THAT(shell("debugfs -R 'cat /value' disk.raw 2>/dev/null"),
                        testing::AnyOf(std::string(9000, 'o'), std::string(12'000, 'n')));
        });
        EXPECT_GT(refused, 0U);
    }
}

std::string crowded_name(unsigned number) { return fmt::format("{:0110}", number); }

/// Files in a directory that grows with each few of them, and not in one piece.
void crowd(Disk& disk, unsigned from) {
    auto files = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
    const auto many = must(find_path(*files, "/many"));
    for (unsigned i = from; i < from + 6; ++i) put(*files, many, crowded_name(i), std::string(2500, 'f'));
    must(files->close());
}

/// Where the directory needs a block for the list of its pieces, too, those must not be found before the block is.
TEST_F(ExtChangeTest, APowerLossTakesNoOtherFileOfTheDirectory) {
    auto files = made_by("mkdir -p tree/many; mke2fs -q -t ext4 -b 1024 -d tree disk.raw 8M");
    Files before;
    unsigned old = 0;
    for (bool grown = false; !grown; old += 6) {
        ASSERT_LT(old, 600U);
        before = copy_of(files);
        StorageDisk disk(files.at(disk_name));
        crowd(disk, old);
        save(files, directory_.path());
        grown = shell("debugfs -R 'stat /many' disk.raw 2>/dev/null").contains("ETB");
    }
    old -= 6;
    ASSERT_GT(old, 0U);
    lose_power(
        before, "crowded directory", 30, 2, [&](Disk& disk) { crowd(disk, old); },
        [&](const Files&) {
            EXPECT_LE(run({"e2fsck", "-fy", disk_name}, directory_.path()).status, 1);
            ASSERT_EQ(faults(), "");
            auto found = must(open_file_system(
                std::make_shared<StorageDisk>(load(directory_.file(disk_name), disk_name)), Access::read));
            for (unsigned i = 0; i < old; ++i)
                ASSERT_EQ(contents(*found, "/many/" + crowded_name(i)), std::string(2500, 'f')) << i;
        });
}

/// What does not fit leaves nothing behind.
TEST_F(ExtChangeTest, FullOnesStaySound) {
    for (const auto& options : ext_kinds) {
        SCOPED_TRACE(options);
        const auto files = made(options + " -m 0 -N 512", "2M");
        StorageDisk disk(files.at(disk_name));
        auto opened = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
        const auto root = opened->root();
        const auto large = must(opened->create(root, "large", node(FileType::regular)));
        const std::string piece(16 * KiB, 'l');
        std::uint64_t at = 0;
        while (opened->write(large, at, std::as_bytes(std::span(piece)))) at += piece.size();
        auto link = node(FileType::symbolic_link);
        link.link_target = std::string(500, 't');
        for (int i = 0; i < 600; ++i) {
            const auto name = fmt::format("{:0200}", i);
            for (const auto& made : {node(FileType::directory), link, node(FileType::regular)}) {
                const auto created = opened->create(root, name, made);
                if (created) break;
                EXPECT_TRUE(fails(created, Errc::no_space));
            }
        }
        must(opened->close());
        save(files, directory_.path());
        EXPECT_EQ(faults(), "");
    }
}

TEST_F(ExtChangeTest, FullOnesCanBeShortened) {
    for (const auto& options : ext_kinds) {
        for (const std::uint64_t size : {0, 5'000, 3'000'000}) {
            SCOPED_TRACE(fmt::format("{}, {} bytes", options, size));
            const auto files = made(options + " -m 0", "8M");
            StorageDisk disk(files.at(disk_name));
            auto opened = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
            // Two files, a piece each at a time: their extents are short, and many.
            const auto one = must(opened->create(opened->root(), "one", node(FileType::regular)));
            const auto other = must(opened->create(opened->root(), "other", node(FileType::regular)));
            const std::string piece(4 * KiB, 'l');
            std::uint64_t at = 0;
            for (; at < 2 * MiB; at += piece.size()) {
                must(opened->write(one, at, std::as_bytes(std::span(piece))));
                must(opened->write(other, at, std::as_bytes(std::span(piece))));
            }
            while (opened->write(one, at, std::as_bytes(std::span(piece)))) at += piece.size();
            must(opened->truncate(one, size));
            must(opened->truncate(other, size / 2));
            must(opened->close());
            save(files, directory_.path());
            EXPECT_EQ(faults(), "");
            EXPECT_EQ(shell("debugfs -R 'cat /one' disk.raw 2>/dev/null | tr -d l | wc -c"), "0\n");
            EXPECT_EQ(shell("debugfs -R 'stat /one' disk.raw 2>/dev/null | grep -o 'Size: [0-9]*' | head -1"),
                      fmt::format("Size: {}\n", size));
        }
    }
}

/// Several blocks of a file share a cluster, and not each block of it must be there.
TEST_F(ExtChangeTest, ClustersOfSeveralBlocksAreFreed) {
    const auto files = made("-t ext4 -O bigalloc -C 16384", "16M");
    StorageDisk disk(files.at(disk_name));
    const auto free_bytes = [&] { return *must(must(open_file_system({&disk, [](Disk*) {}}))->info()).free_bytes; };
    const auto before = free_bytes();
    auto opened = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
    const auto root = opened->root();
    const std::string piece(4 * KiB, 'p');
    const auto make = [&](const std::string& name) {
        const auto inode = must(opened->create(root, name, node(FileType::regular)));
        for (const std::uint64_t block : {1, 3, 4, 6, 9, 14, 15, 22})
            must(opened->write(inode, block * piece.size(), std::as_bytes(std::span(piece))));
        return inode;
    };
    for (const std::uint64_t size : {0, 1, 5'000, 12'289, 16'384, 20'000, 24'577, 70'000, 94'208}) {
        must(opened->truncate(make("short"), size));
        make("new");
        must(opened->replace(root, "new", "short"));
        must(opened->remove(root, "short"));
        must(opened->truncate(make(fmt::format("short to {}", size)), size));
    }
    must(opened->close());
    save(files, directory_.path());
    EXPECT_EQ(faults(), "");
    opened = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
    for (const auto& entry : must(opened->list(root)))
        if (entry.name.starts_with("short")) must(opened->remove(root, entry.name));
    must(opened->close());
    save(files, directory_.path());
    EXPECT_EQ(faults(), "");
    EXPECT_EQ(free_bytes(), before);
}

TEST_F(ExtChangeTest, OnlyFilesOfUsersAreChanged) {
    const auto files = made("-t ext4 -I 256", "8M");
    StorageDisk disk(files.at(disk_name));
    auto opened = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
    const auto root = opened->root();
    const std::string text = "text";
    const auto bytes = std::as_bytes(std::span(text));
    // The bad blocks, the quotas, the boot loader, the resize inode and the journal.
    for (Inode inode = 1; inode < 11; ++inode) {
        EXPECT_TRUE(fails(opened->write(inode, 0, bytes), Errc::invalid_argument)) << inode;
        EXPECT_TRUE(fails(opened->truncate(inode, 0), Errc::invalid_argument)) << inode;
    }
    EXPECT_TRUE(fails(opened->create(8, "new", node(FileType::regular)), Errc::invalid_argument));

    const auto refused = [&](const NewNode& wrong) {
        EXPECT_TRUE(fails(opened->create(root, "new", wrong), Errc::invalid_argument));
        EXPECT_TRUE(fails(opened->lookup(root, "new"), Errc::not_found));
    };
    refused(NewNode{});
    auto wrong = node(FileType::symbolic_link);
    for (const auto& target : {std::string(), std::string("a\0b", 3), std::string(5000, 't')}) {
        wrong.link_target = target;
        refused(wrong);
    }
    wrong = node(FileType::character_device);
    wrong.info.major = 4096;
    refused(wrong);
    wrong = node(FileType::regular);
    for (const auto& name : {std::string("nonsense"), "user." + std::string(300, 'n'), std::string("user."),
                             std::string("system.data"), std::string("user.a\0b", 8)}) {
        wrong.attributes = {{name, {}}};
        refused(wrong);
    }
    wrong.attributes = {{"system.posix_acl_access", std::vector<std::byte>(3)}};
    refused(wrong);
    wrong.attributes = {{"user.long", std::vector<std::byte>(10'000)}};
    EXPECT_TRUE(fails(opened->create(root, "new", wrong), Errc::no_space));
    EXPECT_TRUE(fails(opened->lookup(root, "new"), Errc::not_found));

    const auto directory = must(opened->create(root, "directory", node(FileType::directory)));
    const auto file = put(*opened, root, "file", text);
    must(opened->remove(root, "directory"));
    must(opened->remove(root, "file"));
    EXPECT_TRUE(fails(opened->create(directory, "x", node(FileType::regular)), Errc::not_found));
    EXPECT_TRUE(fails(opened->write(file, 0, bytes), Errc::not_found));
    EXPECT_TRUE(fails(opened->truncate(file, 0), Errc::not_found));

    put(*opened, root, "file", text);
    must(opened->replace(root, "file", "file"));
    EXPECT_EQ(contents(*opened, "/file"), text);
    must(opened->close());
    EXPECT_TRUE(fails(opened->stat(root), Errc::invalid_argument));
    EXPECT_TRUE(fails(opened->write(file, 0, bytes), Errc::invalid_argument));
    EXPECT_TRUE(fails(opened->close(), Errc::invalid_argument));
    save(files, directory_.path());
    EXPECT_EQ(faults(), "");
}

/// What fails halfway is for e2fsck.
TEST_F(ExtChangeTest, HalfOfAChangeIsNotClean) {
    // The extents of the file lead out of the file system.
    const auto files = made_by(R"SH(mkdir tree; head -c 9000 /dev/zero | tr '\0' o > tree/value
        mke2fs -q -t ext4 -O ^metadata_csum -d tree disk.raw 8M
        debugfs -w -R 'set_inode_field value block[5] 0x7fffffff' disk.raw 2>/dev/null)SH");
    StorageDisk disk(files.at(disk_name));
    auto opened = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
    const auto value = must(find_path(*opened, "/value"));
    EXPECT_TRUE(fails(opened->truncate(value, 0), Errc::corrupt));
    must(opened->close());
    EXPECT_TRUE(fails(open_file_system({&disk, [](Disk*) {}}, Access::write), Errc::unsupported));
}

}  // namespace
}  // namespace qcow::test
