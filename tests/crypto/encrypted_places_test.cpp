// Jobs that give encrypted data other places, or look into them: repair and compaction. QEMU reads the results.

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/bits.h"
#include "base/endian.h"
#include "support/bytes.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

constexpr std::uint64_t cluster = 64 * KiB;

class EncryptedPlacesTest : public ToolTest {
protected:
    void SetUp() override {
        put_file(directory_.file("key"), "x");
        put_file(directory_.file("wrong"), "y");
    }

    /// `method`: "luks" or "aes".
    void create(const std::string& method, const std::string& more = "") const {
        const auto options = fmt::format("encrypt.format={},encrypt.key-secret=s{}", method, more);
        const Arguments arguments = {"-q", "--object", "secret,id=s,data=x", "-f", "qcow2", "-o"};
        if (method == "luks") {
            must_tool(joined_arguments(joined_arguments({"create"}, arguments),
                                       {options + ",encrypt.iter-time=10", "disk.qcow2", "4M"}));
        } else {
            must_qemu_img(joined_arguments(joined_arguments({"create"}, arguments), {options, "disk.qcow2", "4M"}),
                          directory_.path());
        }
    }

    void io(const std::vector<std::string>& commands) const {
        must_qemu_io_on_qcow2("disk.qcow2", true, commands, directory_.path());
    }

    void expect_sound(const std::string& what) const {
        const auto checked = qemu_check("disk.qcow2", true, directory_.path());
        EXPECT_EQ(checked.status, 0) << what << checked.text();
    }

    [[nodiscard]] std::uint64_t number(std::uint64_t at) const {
        return load_be<std::uint64_t>(text_bytes(bytes_of("disk.qcow2")), at);
    }

    void poke(std::uint64_t at, std::uint64_t value) const {
        auto bytes = text_bytes(bytes_of("disk.qcow2"));
        store_be(std::span(bytes), at, value);
        put_file(directory_.file("disk.qcow2"), {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    }

    static constexpr std::uint64_t offset_mask = 0x00ff'ffff'ffff'fe00;
    [[nodiscard]] std::uint64_t l1_table() const { return number(40); }
    [[nodiscard]] std::uint64_t l2_table() const { return number(l1_table()) & offset_mask; }

    /// What QEMU reads, with the errors that it ignores.
    [[nodiscard]] std::string contents() const {
        must_qemu_img(
            joined_arguments(joined_arguments({"convert", "-O", "raw"}, qemu_image("disk.qcow2", true)), {"out.raw"}),
            directory_.path());
        return bytes_of("out.raw");
    }
};

TEST_F(EncryptedPlacesTest, RepairGivesDataThatShareAClusterPlacesOfTheirOwn) {
    for (const std::string method : {"luks", "aes"}) {
        SCOPED_TRACE(method);
        create(method);
        io({"write -P 1 0 64k", "write -P 2 64k 64k", "write -P 3 128k 64k", "write -P 4 192k 64k"});
        // The second cluster leads where the first one does, the third one to the L1 table.
        poke(l2_table() + 8, number(l2_table()));
        poke(l2_table() + 16, l1_table() | std::uint64_t{1} << 63);
        const auto damaged = bytes_of("disk.qcow2");
        const auto before = contents();
        const auto planned = tool({"check", "-r", "all", "--dry-run", "--json", "disk.qcow2"});
        EXPECT_EQ(json::parse(planned.out)["corruptions"], 0);
        if (method == "luks") {
            expect_refusal({"check", "-r", "all", "--key", "wrong", "disk.qcow2"}, HasSubstr("the key is wrong"));
            expect_refusal({"check", "-r", "all", "disk.qcow2"}, AllOf(HasSubstr("encrypted"), HasSubstr("--key")));
            EXPECT_TRUE(bytes_of("disk.qcow2") == damaged);
        }
        const Arguments key = method == "luks" ? Arguments{"--key", "key"} : Arguments{};
        const auto repaired = json::parse(
            must_tool(joined_arguments(joined_arguments({"check", "-r", "all", "--json"}, key), {"disk.qcow2"})).out);
        EXPECT_GE(repaired["copied-clusters"], 2);
        EXPECT_TRUE(contents() == before);
        io({"read -P 1 0 64k", "read -P 4 192k 64k"});
        if (method == "luks") io({"read -P 1 64k 64k"});
        expect_sound(method);
        // Each has a place of its own.
        io({"write -P 9 64k 64k", "read -P 1 0 64k", "read -P 9 64k 64k", "read -P 4 192k 64k"});
        EXPECT_EQ(must_tool({"check", "disk.qcow2"}).status, 0);
    }
}

/// Compressed data are not encrypted, so they move as they are.
TEST_F(EncryptedPlacesTest, RepairLeavesCompressedDataAsTheyAre) {
    create("luks");
    io({"write -P 1 0 64k", "write -c -P 2 64k 64k", "write -P 3 128k 64k"});
    const auto stream = number(l2_table() + 8) & low_bits(54);
    poke(l2_table() + 16, align_down(stream, cluster) | std::uint64_t{1} << 63);
    must_tool({"check", "-r", "all", "--key", "key", "disk.qcow2"});
    io({"read -P 1 0 64k", "read -P 2 64k 64k"});
    expect_sound("compressed");
}

TEST_F(EncryptedPlacesTest, ZerosAreFoundInEncryptedData) {
    struct Kind {
        std::string method;
        std::string options;
    };
    for (const auto& [method, options] :
         {Kind{"luks", ""}, {"luks", ",extended_l2=on"}, {"luks", ",encrypt.cipher-mode=cbc"}, {"aes", ""}}) {
        SCOPED_TRACE(method + options);
        create(method, options);
        io({"write -P 1 0 512k", "write -P 0 512k 2M", "write -P 2 3M 64k", "write -P 0 3076k 4k"});
        const auto before = contents();
        const auto whole = bytes_of("disk.qcow2");
        expect_refusal({"compact", "--zeroes", "disk.qcow2"}, AllOf(HasSubstr("encrypted"), HasSubstr("--key")));
        if (method == "luks")
            expect_refusal({"compact", "--zeroes", "--key", "wrong", "disk.qcow2"}, HasSubstr("the key is wrong"));
        expect_refusal({"compact", "--compress", "--key", "key", "disk.qcow2"},
                       HasSubstr("compressed clusters would not be"));
        const auto planned =
            json::parse(must_tool({"compact", "--zeroes", "--dry-run", "--json", "--key", "key", "disk.qcow2"}).out);
        EXPECT_TRUE(bytes_of("disk.qcow2") == whole);
        const auto done = json::parse(must_tool({"compact", "--zeroes", "--json", "--key", "key", "disk.qcow2"}).out);
        EXPECT_EQ(done["unmapped-clusters"], 32);
        EXPECT_EQ(planned["size-after"], done["size-after"]);
        EXPECT_LE(done["size-after"], whole.size() - 2 * MiB);
        EXPECT_TRUE(contents() == before);
        expect_sound(method + options);
        // What decrypts to zeros is no hole, and a hole does not decrypt to zeros.
        EXPECT_EQ(
            json::parse(must_tool({"compact", "--zeroes", "--json", "--key", "key", "disk.qcow2"}).out)["changed"],
            false);
    }
}

}  // namespace
}  // namespace qcow::test
