// qcow check -r.

#include <nlohmann/json.hpp>

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
    expect_refusal({"check", "-r", "all", "raw"}, HasSubstr("only qcow2 images can be repaired"));
    expect_refusal({"check", "-r", "some", "disk.qcow2"}, HasSubstr("-r"));
    expect_refusal({"check", "--dry-run", "disk.qcow2"}, HasSubstr("--repair"));
    expect_refusal({"check", "-r", "all", "-U", "disk.qcow2"}, HasSubstr("disk.qcow2"));
}

}  // namespace
}  // namespace qcow::test
