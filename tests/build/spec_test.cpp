// Specifications: what they say, and what is wrong with them.

#include <gtest/gtest.h>

#include "build/identity.h"
#include "qcow/build.h"
#include "support/result.h"

namespace qcow {
namespace {

using namespace qcow::test;

Result<BuildSpec> parse(std::string_view text) { return parse_build_spec(text, "disk.toml", "/specs"); }

TEST(Spec, SaysWhatADiskHas) {
    const auto spec = must(parse(R"(
        [image]
        size = "1GiB"
        partition_table = "gpt"
        sector_size = 4096
        seed = "a"

        [[partitions]]
        name = "EFI"
        type = "esp"
        size = "64MiB"
        align = "4MiB"
        [partitions.filesystem]
        type = "vfat"
        label = "ESP"
        source = "boot"

        [[partitions]]
        name = "root"
        type = "linux-root-x86-64"
        size = "remaining"
        bootable = true
        [partitions.filesystem]
        type = "ext4"
        source = ["base.tar.gz", "/abs/app"]
        free = "10%"
        owner = "root"
        mtime = 17
        block_size = 1024
        options = { journal_blocks = 2048, metadata_csum = false }
        files = [
            { path = "/etc/hostname", content = "box\n", mode = "0600", uid = 5 },
            { path = "/dev/null", type = "character-device", major = 1, minor = 3 },
            { path = "/bin", target = "usr/bin" },
        ]
    )"));
    EXPECT_EQ(spec.table, BuildSpec::Table::gpt);
    EXPECT_EQ(spec.size, std::uint64_t{1} << 30);
    EXPECT_EQ(spec.sector_size, 4096U);
    ASSERT_EQ(spec.partitions.size(), 2U);
    EXPECT_EQ(spec.partitions[0].size, std::uint64_t{64} << 20);
    EXPECT_EQ(spec.partitions[0].align, std::uint64_t{4} << 20);
    EXPECT_EQ(uuid_text(*spec.partitions[0].type.guid), "c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
    EXPECT_EQ(spec.partitions[0].filesystem->sources, std::vector<std::string>{"/specs/boot"});
    const auto& root = *spec.partitions[1].filesystem;
    EXPECT_TRUE(spec.partitions[1].remaining && spec.partitions[1].bootable && root.root_owns_all);
    EXPECT_EQ(root.sources, (std::vector<std::string>{"/specs/base.tar.gz", "/abs/app"}));
    EXPECT_EQ(root.free_percent, 10U);
    EXPECT_EQ(root.mtime, 17);
    EXPECT_EQ(root.block_size, 1024U);
    EXPECT_EQ(root.options.at("metadata_csum"), "off");
    ASSERT_EQ(root.files.size(), 3U);
    EXPECT_EQ(root.files[0].kind, FileSpec::Kind::regular);
    EXPECT_EQ(root.files[0].mode, 0600U);
    EXPECT_EQ(root.files[1].kind, FileSpec::Kind::character_device);
    EXPECT_EQ(root.files[2].kind, FileSpec::Kind::symlink);
}

TEST(Spec, TakesTheKeysOfFstool) {
    const auto spec = must(parse(R"(
        [filesystem]
        type = "ext4"
        source = "./rootfs"
        block_size = 4096
        journal_blocks = 1024
        rootdevs = "standard"
        volume_label = "rootfs"
        mtime = 0
        sparse = true
    )"));
    EXPECT_EQ(spec.filesystem->label, "rootfs");
    EXPECT_EQ(spec.filesystem->sources.front(), "/specs/rootfs");
    EXPECT_EQ(spec.filesystem->files.front().path, "/dev/console");
    EXPECT_EQ(must(parse("[filesystem]\ntype = \"fat32\"\nsize = \"64MiB\"\nvolume_id = 0xDEADBEEF")).filesystem->uuid,
              (Uuid{0xde, 0xad, 0xbe, 0xef}));
}

TEST(Spec, HasSizesInPowersOf1024And1000) {
    const auto size = [](const std::string& text) {
        return must(parse("[filesystem]\ntype = \"swap\"\nsize = " + text)).filesystem->size;
    };
    EXPECT_EQ(size("512"), 512U);
    EXPECT_EQ(size("\"512\""), 512U);
    EXPECT_EQ(size("\"4 KiB\""), 4096U);
    EXPECT_EQ(size("\"1m\""), std::uint64_t{1} << 20);
    EXPECT_EQ(size("\"2GB\""), 2'000'000'000U);
    EXPECT_EQ(size("\"1.5MiB\""), std::uint64_t{3} << 19);
    EXPECT_EQ(size("\"0.1 KB\""), 100U);
}

TEST(Spec, NamesWhatIsWrongWithLineAndColumn) {
    const auto refused = [](std::string_view text, std::initializer_list<std::string_view> parts) {
        return fails(parse(text), Errc::invalid_argument, parts);
    };
    EXPECT_TRUE(refused("[filesystem]\ntype = \"ext4\"\nvolume_labl = \"x\"",
                        {"disk.toml:3:1", "no key \"volume_labl\"", "did you mean \"volume_label\"?"}));
    EXPECT_TRUE(refused("[filesystem]\ntype = \"ext5\"", {"disk.toml:2:8", "must be ext2, ext3"}));
    EXPECT_TRUE(refused("[filesystem]\ntype = ", {"disk.toml:2"}));
    EXPECT_TRUE(refused("", {"wants [filesystem]"}));
    EXPECT_TRUE(refused("[image]\npartition_table = \"gpt\"", {"no [[partitions]]"}));
    EXPECT_TRUE(refused("[filesystem]\ntype = \"ext4\"\n[[partitions]]\nsize = 1", {"[partitions.filesystem]"}));
    EXPECT_TRUE(refused("[[partitions]]\ntype = \"linx\"\nsize = 1", {"did you mean \"linux\"?"}));
    EXPECT_TRUE(refused("[image]\npartition_table = \"mbr\"\n[[partitions]]\ntype = \"bios-boot\"\nsize = 1",
                        {"MBR partition table does not have"}));
    EXPECT_TRUE(refused("[[partitions]]\nsize = \"12parsecs\"", {"disk.toml:2:8", "wants a size"}));
    EXPECT_TRUE(refused("[[partitions]]\nname = \"x\"", {"neither a size nor a filesystem"}));
    EXPECT_TRUE(refused("[filesystem]\ntype = \"ext4\"\nfiles = [{ path = \"/a\", content = \"\", source = \"b\" }]",
                        {"leave one of them out"}));
    EXPECT_TRUE(refused("[filesystem]\ntype = \"ext4\"\nfiles = [{ path = \"/a\", type = \"fifo\", target = \"b\" }]",
                        {"is no link"}));
    EXPECT_TRUE(refused("[filesystem]\ntype = \"ext4\"\nmtime = \"now\"", {"whole number"}));
    EXPECT_TRUE(refused("[filesystem]\ntype = \"ext4\"\nuuid = \"x\"", {"wants a UUID"}));
    EXPECT_TRUE(refused("[filesystem]\ntype = \"raw\"", {"wants one source"}));
}

TEST(Spec, DerivesIdentitiesFromWhatItSays) {
    auto spec = must(parse("[filesystem]\ntype = \"ext4\"\nlabel = \"a\""));
    const auto seed = seed_of(spec);
    EXPECT_EQ(derived_uuid(seed, "disk"), derived_uuid(seed, "disk"));
    EXPECT_NE(derived_uuid(seed, "disk"), derived_uuid(seed, "partition1"));
    spec.filesystem->label = "b";
    EXPECT_NE(seed_of(spec), seed);
    spec.seed = "own";
    EXPECT_EQ(seed_of(spec), "own");
    EXPECT_EQ(uuid_text(derived_uuid("a", "b"))[14], '8');
}

TEST(Spec, KnowsTypesOfPartitionsByNameGuidAndByte) {
    EXPECT_EQ(must(parse_partition_type("esp")).mbr, 0xef);
    EXPECT_EQ(must(parse_partition_type("0x82")).guid, must(parse_partition_type("swap")).guid);
    EXPECT_EQ(must(parse_partition_type("0FC63DAF-8483-4772-8E79-3D69D8477DE4")).mbr, 0x83);
    EXPECT_FALSE(must(parse_partition_type("0xa5")).guid);
    EXPECT_FALSE(must(parse_partition_type("00000000-0000-0000-0000-000000000001")).mbr);
    EXPECT_TRUE(fails(parse_partition_type("nonsense"), Errc::invalid_argument));
}

}  // namespace
}  // namespace qcow
