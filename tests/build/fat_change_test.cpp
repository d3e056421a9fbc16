// FAT file systems that are changed in place. fsck.fat judges them, and mtools read them.

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>

#include "build/changed_disk.h"
#include "support/effort.h"
#include "support/result.h"

namespace qcow::test {
namespace {

using testing::HasSubstr;

class FatChangeTest : public ChangedDiskTest {
protected:
    /// A file system with old files, in memory.
    [[nodiscard]] Files made(const std::string& options, const std::string& size) const {
        return made_by(fmt::format(R"SH(rm -f disk.raw; truncate -s {} disk.raw; mkfs.fat {} disk.raw > /dev/null
            head -c 5000 /dev/zero | tr '\0' k > keep; head -c 9000 /dev/zero | tr '\0' o > value
            mmd -i disk.raw ::/dir; mcopy -i disk.raw keep value ::/; mcopy -i disk.raw keep "::/dir/a long name"
            mcopy -i disk.raw value ::/dir/OLD.TXT)SH",
                                   size, options));
    }

    /// Makes, replaces and removes files.
    static void change(Disk& disk) {
        auto files = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
        const auto deeper = replace_and_remove(*files, "old.txt", "Deeper directory");
        for (int i = 0; i < 40; ++i) put(*files, deeper, fmt::format("file number {}", i), std::string(700, 'x'));
        must(files->remove(deeper, "file number 3"));
        must(files->close());
        // What is on the disk already is replaced in another order.
        files = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
        must(files->replace(files->root(), "keep", "value"));
        put(*files, files->root(), "keep", std::string(5000, 'k'));
        must(files->close());
    }

    /// What fsck.fat finds, but for what a power loss may leave.
    [[nodiscard]] std::string faults(bool after_power_loss) const {
        const auto checked = run({"fsck.fat", "-n", "-v", disk_name}, directory_.path());
        if (!after_power_loss) return checked.status == 0 ? "" : checked.text();
        std::string faults;
        for (const auto* const fault :
             {"share", "free cluster.", "File size is", "Bad", "Duplicate", "does not point", "Start", "Invalid",
              "size 0", "cluster chain", "First entry", "bad cluster", "beyond"}) {
            if (checked.out.contains(fault)) faults += checked.out;
        }
        return faults;
    }
};

const std::vector<std::pair<std::string, std::string>> fat_kinds = {
    {"-F 12 -s 1", "1M"}, {"-F 16 -s 1", "4M"}, {"-F 32 -s 1", "40M"}, {"-F 16 -S 4096 -s 1", "20M"}};

TEST_F(FatChangeTest, EveryKindIsSoundAfterwards) {
    for (const auto& [options, size] : fat_kinds) {
        SCOPED_TRACE(options);
        const auto files = made(options, size);
        StorageDisk disk(files.at(disk_name));
        change(disk);
        save(files, directory_.path());
        EXPECT_EQ(faults(false), "");
        EXPECT_EQ(shell("mtype -i disk.raw ::/value"), std::string(5000, 'k'));
        EXPECT_EQ(shell("mtype -i disk.raw '::/dir/Deeper directory/file number 39'"), std::string(700, 'x'));
        EXPECT_EQ(shell("mdir -b -i disk.raw '::/dir/Deeper directory' | wc -l"), "39\n");
        EXPECT_THAT(shell("mdir -i disk.raw '::/dir/Deeper directory'"), HasSubstr("2023-11-14  22:13"));
        EXPECT_EQ(shell("mdir -b -i disk.raw ::/dir | grep -ci old.txt || true"), "0\n");
    }
}

TEST_F(FatChangeTest, APowerLossLeavesAtMostLostClusters) {
    for (const auto& [options, size] : fat_kinds) {
        if (size == "40M" && effort() == 1) continue;  // each state takes its time
        lose_power(made(options, size), "fat " + options, 12, 1, change, [&](const Files& crashed) {
            ASSERT_EQ(faults(true), "");
            const auto read = must(open_file_system(std::make_shared<StorageDisk>(crashed.at(disk_name))));
            EXPECT_EQ(contents(*read, "/dir/a long name"), std::string(5000, 'k'));
            EXPECT_THAT(contents(*read, "/value"),
                        testing::AnyOf(std::string(9000, 'o'), std::string(12'000, 'n'), std::string(5000, 'k')));
        });
    }
}

TEST_F(FatChangeTest, FilesGrowAndShrink) {
    const auto files = made("-F 16 -s 1", "4M");
    StorageDisk disk(files.at(disk_name));
    auto opened = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
    const auto inode = put(*opened, opened->root(), "sparse", "begin");
    const std::string end = "end";
    must(opened->write(inode, 10'000, std::as_bytes(std::span(end))));
    auto expected = "begin" + std::string(9995, '\0') + "end";
    EXPECT_TRUE(contents(*opened, "/sparse") == expected);
    must(opened->truncate(inode, 600));
    must(opened->truncate(inode, 3000));
    expected.resize(600);
    expected.resize(3000);
    EXPECT_TRUE(contents(*opened, "/sparse") == expected);
    must(opened->truncate(must(find_path(*opened, "/value")), 0));
    EXPECT_TRUE(fails(opened->truncate(inode, 1ULL << 32), Errc::invalid_argument, {"less than 4 GiB"}));
    must(opened->close());
    save(files, directory_.path());
    EXPECT_EQ(faults(false), "");
    EXPECT_TRUE(shell("mtype -i disk.raw ::/sparse") == expected);
}

TEST_F(FatChangeTest, FullOnesStayAsTheyAre) {
    const auto files = made("-F 12 -s 1 -r 16", "200K");
    StorageDisk disk(files.at(disk_name));
    auto opened = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
    const auto root = opened->root();
    const auto inode = must(opened->create(root, "large", node(FileType::regular)));
    const std::string large(300'000, 'l');
    EXPECT_TRUE(fails(opened->write(inode, 0, std::as_bytes(std::span(large))), Errc::no_space, {"full"}));
    must(opened->remove(root, "large"));
    // The space of a file that was removed is there again.
    must(opened->remove(root, "value"));
    const std::string most(150'000, 'm');
    put(*opened, root, "most", most);
    EXPECT_TRUE(fails(opened->create(root, std::string(200, 'n'), node(FileType::regular)), Errc::no_space,
                      {"the root directory is full"}));
    must(opened->close());
    save(files, directory_.path());
    EXPECT_EQ(faults(false), "");
    EXPECT_TRUE(shell("mtype -i disk.raw ::/most") == most);
}

TEST_F(FatChangeTest, NamesAreComparedAsFatDoes) {
    const auto files = made("-F 16 -s 1", "4M");
    StorageDisk disk(files.at(disk_name));
    auto opened = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
    const auto root = opened->root();
    const auto refused = [&](const std::string& name, std::string_view what) {
        EXPECT_TRUE(fails(opened->create(root, name, node(FileType::regular)), Errc::invalid_argument, {what})) << name;
    };
    put(*opened, root, "Größe and more.txt", "1");
    refused("GRÖSSE?", "character");
    refused("GRÖßE AND MORE.TXT", "exists");
    refused("gr__ea~1.txt", "exists");
    refused("VALUE", "exists");
    refused("aux.c", "device");
    refused("dot.", "end with a dot");
    EXPECT_TRUE(fails(opened->create(root, "pipe", node(FileType::fifo)), Errc::invalid_argument,
                      {"only regular files and directories"}));
    EXPECT_EQ(must(find_path(*opened, "/DIR/A LONG NAME")), must(find_path(*opened, "/dir/a long name")));
    EXPECT_TRUE(fails(opened->remove(root, "dir"), Errc::invalid_argument, {"not empty"}));
    // A short name is free again when its file is removed.
    put(*opened, root, "again.txt", "1");
    must(opened->remove(root, "AGAIN.TXT"));
    put(*opened, root, "again.txt", "2");
    must(opened->close());
    save(files, directory_.path());
    EXPECT_EQ(faults(false), "");
    EXPECT_THAT(shell("mdir -i disk.raw ::/"), HasSubstr("AGAIN    TXT"));
}

TEST_F(FatChangeTest, WhatIsInUseOrDamagedIsRefused) {
    const auto refused = [&](const std::string& script, Errc code, std::string_view what) {
        static_cast<void>(made("-F 16 -s 1", "4M"));
        shell(script);
        const std::shared_ptr<Storage> storage = load(directory_.file(disk_name), disk_name);
        EXPECT_TRUE(fails(open_file_system(std::make_shared<StorageDisk>(storage), Access::write), code, {what}))
            << script;
    };
    const auto set = [](const std::string& at, const std::string& bytes) {
        return fmt::format("printf '{}' | dd of=disk.raw bs=1 seek=$(({})) conv=notrunc status=none; ", bytes, at);
    };
    const std::string sizes =
        "number() { od -An -tu2 -j$1 -N2 disk.raw | tr -d ' '; }; start=$((512 * $(number 14))); "
        "size=$((512 * $(number 22))); ";
    const auto set_link = [&](unsigned at, const std::string& bytes) {
        return sizes + set(fmt::format("start + {}", at), bytes) + set(fmt::format("start + size + {}", at), bytes);
    };
    refused(set("37", "\\x01"), Errc::unsupported, "was not unmounted");
    refused("truncate -s 3M disk.raw", Errc::corrupt, "the disk ends");
    refused(set_link(3, "\\x7f"), Errc::unsupported, "was not unmounted");
    refused(set_link(3, "\\xbf"), Errc::corrupt, "marked as damaged");
    refused(sizes + set("start + 100", "\\x7f"), Errc::corrupt, "copies of its table of clusters differ");
}

TEST_F(FatChangeTest, DirectoriesWithManyFilesAreChangedQuickly) {
    shell("truncate -s 64M disk.raw; mkfs.fat -F 32 -s 1 disk.raw > /dev/null");
    const Files files = {{disk_name, load(directory_.file(disk_name), disk_name)}};
    StorageDisk disk(files.at(disk_name));
    auto opened = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
    const auto directory = must(opened->create(opened->root(), "many", node(FileType::directory)));
    for (int i = 0; i < 8000; ++i)
        must(opened->create(directory, fmt::format("file.{:05}", i), node(FileType::regular)));
    must(opened->close());
    save(files, directory_.path());
    EXPECT_EQ(faults(false), "");
}

TEST_F(FatChangeTest, WhatFatCannotHoldIsRefused) {
    shell("truncate -s 8M disk.raw; mkfs.fat disk.raw > /dev/null");
    const Files files = {{disk_name, load(directory_.file(disk_name), disk_name)}};
    StorageDisk disk(files.at(disk_name));
    auto opened = must(open_file_system({&disk, [](Disk*) {}}, Access::write));
    const auto root = opened->root();
    auto marked = node(FileType::regular);
    marked.attributes = {{"user.mark", {}}};
    EXPECT_TRUE(fails(opened->create(root, "marked", marked), Errc::unsupported));
    put(*opened, root, "file", "text");
    must(opened->replace(root, "file", "FILE"));
    EXPECT_EQ(contents(*opened, "/file"), "text");
    must(opened->close());
    EXPECT_TRUE(fails(opened->stat(root), Errc::invalid_argument));
    save(files, directory_.path());
    EXPECT_EQ(faults(false), "");
}

}  // namespace
}  // namespace qcow::test
