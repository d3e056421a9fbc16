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

}  // namespace
}  // namespace qcow::test
