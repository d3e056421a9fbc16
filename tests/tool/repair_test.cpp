// qcow check -r.

#include <nlohmann/json.hpp>

#include "support/loop_device.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

class RepairToolTest : public ToolTest {
protected:
    void create(const std::string& options = "cluster_size=64k") {
        must_qemu_img({"create", "-q", "-f", "qcow2", "-o", options, "disk.qcow2", "1M"}, directory_.path());
        must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 7 0 256k"}, directory_.path());
    }

    [[nodiscard]] std::uint64_t number(std::uint64_t at) const {
        const auto bytes = bytes_of("disk.qcow2");
        std::uint64_t value = 0;
        for (unsigned i = 0; i < 8; ++i) value = value << 8 | static_cast<unsigned char>(bytes.at(at + i));
        return value;
    }

    /// Changes bytes of the image, the most significant one first.
    void poke(std::uint64_t at, std::uint64_t value, unsigned width = 8) const {
        auto bytes = bytes_of("disk.qcow2");
        for (unsigned i = 0; i < width; ++i) bytes.at(at + i) = static_cast<char>(value >> (8 * (width - 1 - i)));
        put_file(directory_.file("disk.qcow2"), bytes);
    }

    static constexpr std::uint64_t offset_mask = 0x00ff'ffff'ffff'fe00;
    [[nodiscard]] std::uint64_t l2_table() const { return number(number(40)) & offset_mask; }
    [[nodiscard]] std::uint64_t refcount_block() const { return number(number(48)); }
};

TEST_F(RepairToolTest, LeaksAreGivenBack) {
    create();
    poke(l2_table(), 0);  // the first cluster is in use no more
    EXPECT_EQ(tool({"check", "disk.qcow2"}).status, 3);
    const auto before = bytes_of("disk.qcow2");
    const auto planned = must_tool({"check", "-r", "leaks", "--dry-run", "disk.qcow2"});
    EXPECT_THAT(planned.out, HasSubstr("1 leaked clusters and 0 corruptions would be repaired"));
    EXPECT_EQ(bytes_of("disk.qcow2"), before);
    const auto repaired = must_tool({"check", "--repair", "leaks", "--json", "disk.qcow2"});
    EXPECT_EQ(json::parse(repaired.out)["leaks-fixed"], 1);
    EXPECT_EQ(json::parse(repaired.out)["leaks"], 0);
    EXPECT_THAT(must_tool({"check", "-r", "leaks", "disk.qcow2"}).out, HasSubstr("nothing to repair"));
}

TEST_F(RepairToolTest, LossesAreSaidFirst) {
    create();
    poke(l2_table() + 8, std::uint64_t{1} << 40);
    const auto only_leaks = tool({"check", "-r", "leaks", "disk.qcow2"});
    EXPECT_EQ(only_leaks.status, 2);
    EXPECT_THAT(only_leaks.out, HasSubstr("nothing can be repaired"));
    const auto repaired = tool({"check", "-r", "all", "disk.qcow2"});
    EXPECT_EQ(repaired.status, 0);
    EXPECT_THAT(repaired.err, AllOf(HasSubstr("65536 guest bytes from 0x10000 on are lost and will read as zeros"),
                                    HasSubstr("past the end of the file")));
    EXPECT_THAT(repaired.out, AllOf(HasSubstr("corruptions were repaired"), HasSubstr("clean")));
    EXPECT_EQ(must_tool({"read", "disk.qcow2", "64k", "64k"}).out, std::string(65536, '\0'));
    EXPECT_EQ(must_tool({"read", "disk.qcow2", "0", "64k"}).out, std::string(65536, '\7'));
}

TEST_F(RepairToolTest, EveryOverlapGetsAPlaceOfItsOwn) {
    create();
    poke(l2_table() + 8, refcount_block() | std::uint64_t{1} << 63);
    const auto repaired = json::parse(must_tool({"check", "-r", "all", "--json", "disk.qcow2"}).out);
    EXPECT_EQ(repaired["refcounts-rebuilt"], true);
    poke(l2_table() + 8, number(40) | std::uint64_t{1} << 63);
    EXPECT_EQ(json::parse(must_tool({"check", "-r", "all", "--json", "disk.qcow2"}).out)["copied-clusters"], 1);
    must_qemu_img({"check", "disk.qcow2"}, directory_.path());
}

TEST_F(RepairToolTest, InconsistentBitmapsAreRemovedWhenAskedTo) {
    create();
    must_qemu_img({"bitmap", "--add", "disk.qcow2", "kept"}, directory_.path());
    must_qemu_img({"bitmap", "--add", "disk.qcow2", "lost"}, directory_.path());
    const auto directory = number(bytes_of("disk.qcow2").find(std::string("\x23\x85\x28\x75", 4)) + 24);
    poke(directory + 32, std::uint64_t{1} << 40);  // the table of the second one
    const auto repaired = tool({"check", "-r", "all", "disk.qcow2"});
    EXPECT_EQ(repaired.status, 0);
    EXPECT_THAT(repaired.err, HasSubstr("bitmap \"lost\" is lost"));
    EXPECT_THAT(must_tool({"info", "disk.qcow2"}).out, AllOf(HasSubstr("kept"), HasSubstr("lost")));
    const auto removed = must_tool({"check", "-r", "all", "--remove-inconsistent-bitmaps", "--json", "disk.qcow2"});
    EXPECT_EQ(json::parse(removed.out)["removed-bitmaps"], 1);
    EXPECT_THAT(must_tool({"info", "disk.qcow2"}).out, AllOf(HasSubstr("kept"), testing::Not(HasSubstr("lost"))));
    must_qemu_img({"check", "disk.qcow2"}, directory_.path());
}

TEST_F(RepairToolTest, EncryptedData) {
    make_encrypted_image("disk.qcow2", "1M", directory_.path());
    const auto clusters = bytes_of("disk.qcow2").size() / 65536 + 1;
    poke(refcount_block() + 2 * clusters, 1, 2);
    poke(number(40), std::uint64_t{1} << 40);
    EXPECT_EQ(tool({"check", "disk.qcow2"}).status, 2);
    EXPECT_EQ(tool({"check", "-r", "all", "disk.qcow2"}).status, 0);
    must_qemu_img({"check", "--object", "secret,id=s,data=x", "--image-opts",
                   "driver=qcow2,encrypt.key-secret=s,file.filename=disk.qcow2"},
                  directory_.path());
}

TEST_F(RepairToolTest, NobodyElseUsesTheImage) {
    create();
    Subprocess other({"qemu-io", "-f", "qcow2", "disk.qcow2"}, directory_.path());
    other.write("write -P 1 0 512\n");
    other.wait_for("wrote");
    expect_refusal({"check", "-r", "all", "disk.qcow2"}, HasSubstr("disk.qcow2"));
}

TEST_F(RepairToolTest, WhatCannotBeRepaired) {
    create();
    put_file(directory_.file("raw"), std::string(65536, 'x'));
    const auto raw = tool({"check", "-r", "all", "raw"});
    EXPECT_EQ(raw.status, 63);
    EXPECT_THAT(raw.err, HasSubstr("only qcow2 images can be repaired"));
    EXPECT_EQ(tool({"check", "raw"}).status, 63);
    EXPECT_EQ(qemu_img({"check", "raw"}, directory_.path()).status, 63);
    EXPECT_EQ(tool({"check", "missing"}).status, 1);
    expect_refusal({"check", "-r", "leaks", "--remove-inconsistent-bitmaps", "disk.qcow2"}, HasSubstr("-r all"));
    expect_refusal({"check", "-r", "some", "disk.qcow2"}, HasSubstr("-r"));
    expect_refusal({"check", "--dry-run", "disk.qcow2"}, HasSubstr("--repair"));
    expect_refusal({"check", "-r", "all", "-U", "disk.qcow2"}, HasSubstr("disk.qcow2"));
}

/// The rest of the file's last cluster reads as zeros, in a table as in data.
TEST_F(RepairToolTest, ATableAtTheEndOfACutFileKeepsWhatIsThere) {
    create();
    must_qemu_img({"snapshot", "-c", "s", "disk.qcow2"}, directory_.path());
    must_qemu_io("disk.qcow2", "qcow2", {"write -q -z 0 64k"}, directory_.path());  // a table of its own, at the end
    const auto size = bytes_of("disk.qcow2").size();
    ASSERT_EQ(l2_table() + 65536, size);
    std::filesystem::resize_file(directory_.file("disk.qcow2"), size - 60000);
    const auto checked = tool({"check", "--json", "disk.qcow2"});
    EXPECT_EQ(checked.status, 2);
    EXPECT_EQ(json::parse(checked.out)["missing-bytes"], 60000);
    EXPECT_EQ(json::parse(checked.out)["corruptions"], 1);
    EXPECT_THAT(tool({"check", "disk.qcow2"}).out, HasSubstr("ends 60000 bytes before its last table"));
    for (const auto& command : {Arguments{"discard", "disk.qcow2", "0", "64k"}, Arguments{"compact", "disk.qcow2"}})
        EXPECT_NE(tool(command).status, 0);
    const auto expected = std::string(65536, '\0') + std::string(3 * 65536, '\7') + std::string(12 * 65536, '\0');
    EXPECT_EQ(must_tool({"read", "disk.qcow2", "64k", "192k"}).out, std::string(3 * 65536, '\7'));
    EXPECT_NE(tool({"read", "disk.qcow2", "0", "1M"}).status, 0);  // an entry of zeros may be one that is missing
    EXPECT_EQ(must_tool({"check", "-r", "all", "disk.qcow2"}).err, "");
    EXPECT_EQ(bytes_of("disk.qcow2").size(), size);
    EXPECT_EQ(must_tool({"read", "disk.qcow2", "0", "1M"}).out, expected);
    must_qemu_img({"check", "disk.qcow2"}, directory_.path());
}

/// The same for every other table that may be the file's last one.
TEST_F(RepairToolTest, EveryTableMayEndWithTheFile) {
    create();
    must_qemu_img({"bitmap", "--add", "disk.qcow2", "kept"}, directory_.path());
    must_qemu_img({"snapshot", "-c", "s", "disk.qcow2"}, directory_.path());
    const auto sound = bytes_of("disk.qcow2");
    const auto directory = number(sound.find(std::string("\x23\x85\x28\x75", 4)) + 24);
    struct Table {
        std::string name;
        std::uint64_t at;
        std::uint64_t used;  // bytes, behind which it is cut
    };
    const auto snapshots = number(64);
    for (const auto& [name, table, used] :
         {Table{"L1", number(40), 8}, Table{"L2", l2_table(), 32}, Table{"refcount table", number(48), 8},
          Table{"refcount block", refcount_block(), 40}, Table{"bitmap directory", directory, 32},
          Table{"bitmap table", number(directory), 8}, Table{"snapshot table", snapshots, 72},
          Table{"L1 of the snapshot", number(snapshots), 8}}) {
        SCOPED_TRACE(name);
        // The table moves to the end of the file, and its old cluster is gone.
        auto bytes = sound;
        const auto end = (bytes.size() + 65535) / 65536 * 65536;
        bytes.resize(end);
        bytes += sound.substr(table, used);
        for (std::size_t at = 0; at + 8 <= end; at += 8) {
            std::uint64_t word = 0;
            for (unsigned i = 0; i < 8; ++i) word = word << 8 | static_cast<unsigned char>(bytes[at + i]);
            if ((word & offset_mask) != table || table == 0) continue;
            word = (word & ~offset_mask) | end;
            for (unsigned i = 0; i < 8; ++i) bytes[at + i] = static_cast<char>(word >> (56 - 8 * i));
        }
        put_file(directory_.file("disk.qcow2"), bytes);
        EXPECT_EQ(tool({"check", "-r", "all", "disk.qcow2"}).status, 0);
        EXPECT_EQ(must_tool({"read", "disk.qcow2", "0", "256k"}).out, std::string(4 * 65536, '\7'));
        EXPECT_THAT(must_tool({"info", "disk.qcow2"}).out, HasSubstr("kept"));
        EXPECT_THAT(must_tool({"snapshot", "-l", "disk.qcow2"}).out, HasSubstr("s"));
        must_qemu_img({"check", "disk.qcow2"}, directory_.path());
    }
}

TEST_F(RepairToolTest, OnlyTheSubclustersThatALostClusterHeldBecomeZeros) {
    put_file(directory_.file("base.raw"), std::string(1 << 20, 'B'));
    must_qemu_img({"create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", "base.raw", "-F", "raw", "disk.qcow2"},
                  directory_.path());
    must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 65 64k 2k", "write -q -P 65 72k 4k", "write -q -z 80k 2k"},
                 directory_.path());
    must_qemu_img({"snapshot", "-c", "s", "disk.qcow2"}, directory_.path());
    poke(l2_table() + 16, std::uint64_t{0x5050000});
    const auto repaired = tool({"check", "-r", "all", "disk.qcow2"});
    EXPECT_EQ(repaired.status, 0);
    EXPECT_THAT(repaired.err, AllOf(HasSubstr("2048 guest bytes from 0x10000 on are lost"),
                                    HasSubstr("4096 guest bytes from 0x12000 on are lost")));
    const auto zeros = [](std::size_t count) { return std::string(count, '\0'); };
    EXPECT_EQ(must_tool({"read", "disk.qcow2", "64k", "64k"}).out, zeros(2048) + std::string(6144, 'B') + zeros(4096) +
                                                                       std::string(4096, 'B') + zeros(2048) +
                                                                       std::string(47104, 'B'));
    must_qemu_img({"check", "disk.qcow2"}, directory_.path());
}

TEST_F(RepairToolTest, ABlockDeviceHasRoomInItsFreeClusters) {
    const LoopDevice device(16 << 20);
    if (!device.obstacle().empty()) GTEST_SKIP() << device.obstacle();
    must_qemu_img({"create", "-q", "-f", "qcow2", device.path(), "4M"}, directory_.path());
    must_qemu_io(device.path(), "qcow2", {"write -q -P 7 0 1M"}, directory_.path());
    auto bytes = file_bytes(device.path());
    const auto refcounts = bytes.substr(48, 8);
    const auto table = static_cast<std::size_t>(static_cast<unsigned char>(refcounts[5])) << 16;
    bytes.replace(table, 8, 8, '\0');
    put_file(device.path(), bytes);
    must_tool({"check", "-r", "all", "--dry-run", device.path()});
    must_tool({"check", "-r", "all", device.path()});
    EXPECT_EQ(must_tool({"read", device.path(), "0", "1M"}).out, std::string(1 << 20, '\7'));
    must_qemu_img({"check", "-f", "qcow2", device.path()}, directory_.path());
}

TEST_F(RepairToolTest, ADeviceWithoutRoomStaysAsItIs) {
    // Each cluster of the device is in use: 16 of data, and 5 of metadata.
    const LoopDevice device(21 * 65536);
    if (!device.obstacle().empty()) GTEST_SKIP() << device.obstacle();
    must_qemu_img({"create", "-q", "-f", "qcow2", device.path(), "1M"}, directory_.path());
    must_qemu_io(device.path(), "qcow2", {"write -q -P 7 0 1M"}, directory_.path());
    auto bytes = file_bytes(device.path());
    bytes.replace(65536, 8, 8, '\0');  // the refcount table
    put_file(device.path(), bytes);
    for (const bool dry : {true, false}) {
        Arguments arguments = {"check", "-r", "all", device.path()};
        if (dry) arguments.emplace_back("--dry-run");
        expect_refusal(arguments, HasSubstr("cannot grow"));
        EXPECT_EQ(file_bytes(device.path()), bytes);
    }
}

TEST_F(RepairToolTest, BitmapsWithExtraDataAreNotForThePeer) {
    for (const bool ignorable : {true, false}) {
        SCOPED_TRACE(ignorable);
        create();
        must_qemu_img({"bitmap", "--add", "disk.qcow2", "b"}, directory_.path());
        const auto directory = number(bytes_of("disk.qcow2").find(std::string("\x23\x85\x28\x75", 4)) + 24);
        poke(directory + 20, 4, 4);
        poke(directory + 24, 0x01020304, 4);
        poke(directory + 28, 'b', 1);
        if (ignorable) poke(directory + 12, 6, 4);
        EXPECT_EQ(tool({"check", "disk.qcow2"}).status, 1);
        EXPECT_EQ(tool({"check", "-r", "leaks", "disk.qcow2"}).status, 1);
        const auto repaired = tool({"check", "-r", "all", "disk.qcow2"});
        EXPECT_EQ(repaired.status, 0);
        EXPECT_EQ(repaired.err.contains("bitmap \"b\" is lost: it has extra data"), !ignorable);
        must_qemu_img({"check", "disk.qcow2"}, directory_.path());
        EXPECT_EQ(must_tool({"info", "--json", "disk.qcow2"}).out.contains("\"b\""), ignorable);
        std::filesystem::remove(directory_.file("disk.qcow2"));
    }
}

TEST_F(RepairToolTest, AnAutoclearBitWithoutItsExtension) {
    create();
    poke(88, 1);
    EXPECT_EQ(tool({"check", "disk.qcow2"}).status, 2);
    must_tool({"check", "-r", "all", "disk.qcow2"});
    EXPECT_EQ(number(88), 0U);
    must_qemu_io("disk.qcow2", "qcow2", {"write -q 0 64k"}, directory_.path());
}

TEST_F(RepairToolTest, RemovedBitmapsAreNamedOnce) {
    create();
    must_qemu_img({"bitmap", "--add", "disk.qcow2", "kept"}, directory_.path());
    must_qemu_img({"bitmap", "--add", "disk.qcow2", "open"}, directory_.path());
    const auto directory = number(bytes_of("disk.qcow2").find(std::string("\x23\x85\x28\x75", 4)) + 24);
    poke(directory + 32 + 12, 3, 4);
    EXPECT_THAT(must_tool({"check", "disk.qcow2"}).out,
                AllOf(HasSubstr("\"open\""), HasSubstr("--remove-inconsistent-bitmaps")));
    EXPECT_EQ(json::parse(must_tool({"check", "--json", "disk.qcow2"}).out)["inconsistent-bitmaps"],
              json::array({"open"}));
    const Arguments remove = {"check", "-r", "all", "--remove-inconsistent-bitmaps", "disk.qcow2"};
    EXPECT_THAT(must_tool(remove).out, HasSubstr("inconsistent bitmaps were removed: \"open\""));
    const auto once = bytes_of("disk.qcow2");
    EXPECT_THAT(must_tool(remove).out, HasSubstr("nothing to repair"));
    EXPECT_EQ(bytes_of("disk.qcow2"), once);
}

TEST_F(RepairToolTest, RefcountsPastTheEndOfACutFileAreCleared) {
    create();
    must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 7 0 1M"}, directory_.path());
    std::filesystem::resize_file(directory_.file("disk.qcow2"), 8 * 65536);
    EXPECT_EQ(tool({"check", "-r", "all", "disk.qcow2"}).status, 0);
    const auto report = json::parse(must_tool({"check", "--json", "disk.qcow2"}).out);
    EXPECT_EQ(report["counted-past-end"], 0);
    must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 8 0 1M"}, directory_.path());
    must_tool({"check", "disk.qcow2"});
    // The same in an image that has no other flaw.
    poke(refcount_block() + 2 * 1000, 1, 2);
    EXPECT_EQ(json::parse(must_tool({"check", "--json", "disk.qcow2"}).out)["counted-past-end"], 1);
    must_tool({"check", "-r", "all", "disk.qcow2"});
    EXPECT_EQ(json::parse(must_tool({"check", "--json", "disk.qcow2"}).out)["counted-past-end"], 0);
}

/// A write to one of two entries that share a cluster would leave the other one without its COPIED flag.
TEST_F(RepairToolTest, TwoEntriesOfTheDiskGetClustersOfTheirOwn) {
    for (const bool tables : {false, true}) {
        for (const bool snapshot : {false, true}) {
            SCOPED_TRACE(testing::Message() << tables << snapshot);
            must_qemu_img({"create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "disk.qcow2", "4M"},
                          directory_.path());
            must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 7 0 8k", "write -q -P 7 2M 8k"}, directory_.path());
            if (snapshot) must_qemu_img({"snapshot", "-c", "s", "disk.qcow2"}, directory_.path());
            const auto table = tables ? number(40) : l2_table();
            poke(table + 8, number(table));
            must_tool({"check", "-r", "all", "disk.qcow2"});
            const auto before = must_tool({"read", "disk.qcow2", "0", "4M"}).out;
            must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 8 0 4k"}, directory_.path());
            must_tool({"check", "disk.qcow2"});
            must_qemu_img({"check", "disk.qcow2"}, directory_.path());
            EXPECT_TRUE(must_tool({"read", "disk.qcow2", "4k", "4092k"}).out == before.substr(4096));
            std::filesystem::remove(directory_.file("disk.qcow2"));
        }
    }
}

TEST_F(RepairToolTest, MarksThatAreClearedAreSaid) {
    create("lazy_refcounts=on");
    poke(72, 3);  // dirty and corrupt
    poke(refcount_block(), 2, 2);
    const auto repaired = must_tool({"check", "-r", "leaks", "disk.qcow2"});
    EXPECT_THAT(repaired.out, AllOf(HasSubstr("\"dirty\" was cleared"), HasSubstr("\"corrupt\" was cleared"),
                                    HasSubstr("0 corruptions were repaired"), HasSubstr("1 postponed refcounts")));
    poke(72, 2);
    const auto report = json::parse(must_tool({"check", "-r", "all", "--json", "disk.qcow2"}).out);
    EXPECT_EQ(report["corrupt-cleared"], true);
    EXPECT_EQ(report["dirty-cleared"], false);
    EXPECT_EQ(report["before"]["marked-corrupt"], true);
    EXPECT_EQ(report["before"]["corruptions"], 0);
}

}  // namespace
}  // namespace qcow::test
