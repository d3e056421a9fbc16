// Headers of LUKS1 that are damaged, of a disk by itself and in a qcow2 image: each error names what is wrong.

#include <nlohmann/json.hpp>

#include "base/bits.h"
#include "base/endian.h"
#include "format/header.h"
#include "support/bytes.h"
#include "support/result.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

enum class Where : std::uint8_t { everywhere, disk, image };

/// Bytes that are written over those of a header, at an offset in it.
struct HeaderDamage {
    std::uint64_t at;
    std::string bytes;
    std::string error;
    Where where = Where::everywhere;
};

std::string big_endian(std::uint32_t value) {
    Bytes bytes(4);
    store_be(std::span(bytes), 0, value);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

constexpr std::uint32_t huge = 0xffff'ffff;
constexpr std::uint64_t slot = 208;
constexpr std::uint64_t slot_bytes = 48;

const std::vector<HeaderDamage>& all_damages() {
    static const std::vector<HeaderDamage> all = {
        {0, "M", "it does not begin with \"LUKS"},
        {6, std::string("\0\7", 2), "version 7 instead of 1"},
        {6, std::string("\0\2", 2), "version 2 instead of 1", Where::image},
        {8, std::string("rot13\0", 6), "rot13-xts-plain64 with a key of 512 bits is not supported"},
        {8, std::string(32, '\0'), "no name of a cipher"},
        {40, std::string("ctr-plain64\0", 12), "the modes xts, cbc and ecb are"},
        {40, std::string("xts-benbi\0", 10), "the vectors plain, plain64 and essiv are"},
        {40, std::string("xts-essiv:md5\0", 14), "\"md5\""},
        {40, std::string(32, '\0'), "no name of a cipher mode"},
        {72, std::string("md5\0", 4), "the hash \"md5\" is not supported"},
        {72, std::string(32, '\0'), "no name of a hash"},
        {104, big_endian(0), "detached", Where::disk},
        {104, big_endian(huge), "past the end of the file", Where::disk},
        {108, big_endian(0), "a key of 0 bytes"},
        {108, big_endian(huge), "a key of 4294967295 bytes"},
        {108, big_endian(24), "a key of 192 bits is not supported"},
        {112, std::string(20, '#'), "the key is wrong"},
        {164, big_endian(0), "0 iterations for the digest"},
        {164, big_endian(huge), "--max-kdf-seconds"},
        {slot, big_endian(0x1234), "no key slot is in use"},
        {slot, big_endian(0x1234), "key slot 0 is damaged"},
        {slot, big_endian(0xdead), "no key slot is in use"},
        {slot + 4, big_endian(0), "key slot 0 has 0 iterations"},
        {slot + 4, big_endian(huge), "--max-kdf-seconds"},
        {slot + 40, big_endian(0), "the key material of slot 0 overlaps the header"},
        {slot + 40, big_endian(huge), "the key material of slot 0 at offset 0x1fffffffe00 ends past the end"},
        {slot + slot_bytes + 40, big_endian(9), "the key materials of slots 0 and 1 overlap"},
        {slot + 44, big_endian(huge), "key slot 0 has 4294967295 stripes instead of 4000"},
    };
    return all;
}

class DamagedHeadersTest : public ToolTest {
protected:
    void SetUp() override {
        put_file(directory_.file("key"), "x");
        must_tool({"create", "-q", "-f", "luks", "--key", "key", "-o", "iter-time=10", "disk", "64k"});
        must_tool({"create", "-q", "-f", "qcow2", "--key", "key", "-o", "encrypt.format=luks,encrypt.iter-time=10",
                   "image", "64k"});
    }

    [[nodiscard]] std::string refusal_of(const std::string& format, const std::string& bytes) const {
        put_file(directory_.file("damaged"), bytes);
        const auto opened = tool({"read", "-f", format, "--key", "key", "damaged", "0", "512"});
        EXPECT_EQ(opened.status, 1);
        EXPECT_EQ(opened.out, "");
        return opened.err;
    }

    /// The place and length of the header in the qcow2 image.
    [[nodiscard]] format::EncryptionExtension extension() const {
        return *must(format::parse_header(text_bytes(bytes_of("image").substr(0, 64 * KiB)))).encryption;
    }
};

TEST_F(DamagedHeadersTest, EachDamageIsNamed) {
    for (const auto& [at, bytes, error, where] : all_damages()) {
        SCOPED_TRACE(error);
        if (where != Where::image) {
            auto disk = bytes_of("disk");
            disk.replace(at, bytes.size(), bytes);
            EXPECT_THAT(refusal_of("luks", disk), AllOf(HasSubstr("damaged: "), HasSubstr(error)));
        }
        if (where != Where::disk) {
            auto image = bytes_of("image");
            image.replace(extension().offset.value + at, bytes.size(), bytes);
            EXPECT_THAT(refusal_of("qcow2", image), AllOf(HasSubstr("damaged: "), HasSubstr(error)));
        }
    }
}

TEST_F(DamagedHeadersTest, HeadersThatAreCut) {
    const auto disk = bytes_of("disk");
    EXPECT_THAT(refusal_of("luks", ""), HasSubstr("0 bytes instead of 592"));
    EXPECT_THAT(refusal_of("luks", disk.substr(0, 591)), HasSubstr("591 bytes instead of 592"));
    EXPECT_THAT(refusal_of("luks", disk.substr(0, 100'000)), HasSubstr("past the end of the file (100000 bytes)"));
    const auto image = bytes_of("image");
    const auto at = extension().offset.value;
    EXPECT_THAT(refusal_of("qcow2", image.substr(0, at + 500)), HasSubstr("500 bytes instead of 592"));
    EXPECT_THAT(
        refusal_of("qcow2", image.substr(0, at + 100'000)),
        HasSubstr("the key material of slot 0 at offset 0x1000 ends past the end of the header (100000 bytes)"));
    // The header extension that says where it lies.
    const auto field = image.find(std::string("\x05\x37\xbe\x77", 4));
    const auto with = [&](std::uint64_t offset, const std::string& bytes) {
        auto changed = image;
        return changed.replace(field + offset, bytes.size(), bytes);
    };
    EXPECT_THAT(refusal_of("qcow2", with(4, big_endian(8))), HasSubstr("16"));
    EXPECT_THAT(refusal_of("qcow2", with(8, big_endian(1))), HasSubstr("0 bytes instead of 592"));
    EXPECT_THAT(refusal_of("qcow2", with(12, big_endian(512))), HasSubstr("not a multiple of the cluster size"));
    EXPECT_THAT(refusal_of("qcow2", with(0, big_endian(0x1234))), HasSubstr("the header extension for it is missing"));
    EXPECT_THAT(refusal_of("qcow2", with(20, big_endian(100'000))), HasSubstr("ends past the end of the header"));
}

/// A check needs no key, and finds all that a key would meet, but for what takes a derivation.
TEST_F(DamagedHeadersTest, ChecksFindDamage) {
    EXPECT_EQ(tool({"check", "image"}).status, 0);
    const auto image = bytes_of("image");
    for (const auto& [at, bytes, error, where] : all_damages()) {
        if (where == Where::disk || error == "the key is wrong" || error == "--max-kdf-seconds") continue;
        SCOPED_TRACE(error);
        auto damaged = image;
        put_file(directory_.file("damaged"), damaged.replace(extension().offset.value + at, bytes.size(), bytes));
        const auto checked = tool({"check", "--json", "damaged"});
        const auto report = nlohmann::json::parse(checked.out);
        const auto finding = report.at("findings").at(0);
        EXPECT_EQ(report.at("findings").size(), 1U);
        EXPECT_EQ(finding.at("kind"), "bad-encryption");
        EXPECT_EQ(finding.at("place"), "encryption header");
        EXPECT_EQ(finding.at("remedy"), "nothing");
        EXPECT_THAT(finding.at("what").get<std::string>(), HasSubstr(error));
        // What is not supported need not be damage.
        EXPECT_EQ(checked.status, finding.at("severity") == "corruption" ? 2 : 1);
        const auto theirs = qemu_check("damaged", true, directory_.path());
        EXPECT_NE(theirs.status, 0) << theirs.text();
    }
}

TEST_F(DamagedHeadersTest, NoRepairMendsThem) {
    auto image = bytes_of("image");
    const auto at = extension().offset.value;
    image.replace(at, 4, "####");
    image[79] = '\2';  // the mark of corruption
    put_file(directory_.file("damaged"), image);
    for (const std::string what : {"all", "leaks"}) {
        const auto repaired = tool({"check", "-r", what, "damaged"});
        EXPECT_EQ(repaired.status, 2) << what;
        EXPECT_THAT(repaired.out, AllOf(HasSubstr("nothing can be repaired"), HasSubstr("No repair mends"),
                                        Not(HasSubstr("cleared")), Not(HasSubstr("clean\n"))));
        EXPECT_TRUE(bytes_of("damaged") == image);
    }
    // It is mended from a copy.
    put_file(directory_.file("damaged"), image.replace(at, 4, bytes_of("image").substr(at, 4)));
    EXPECT_THAT(must_tool({"check", "-r", "all", "damaged"}).out, HasSubstr("the mark \"corrupt\" was cleared"));
    EXPECT_EQ(must_tool({"read", "--key", "key", "damaged", "0", "512"}).out, std::string(512, '\0'));
    // Where the extension of the qcow2 header leads elsewhere, or says another length.
    const auto field = image.find(std::string("\x05\x37\xbe\x77", 4));
    const std::vector<std::pair<std::uint64_t, std::string>> places = {
        {12, big_endian(0)}, {8, big_endian(1)}, {20, big_endian(591)}, {20, big_endian(100'000)}};
    for (const auto& [offset, bytes] : places) {
        auto changed = bytes_of("image");
        put_file(directory_.file("damaged"), changed.replace(field + offset, bytes.size(), bytes));
        const auto checked = tool({"check", "damaged"});
        EXPECT_EQ(checked.status, 2);
        EXPECT_THAT(checked.out, HasSubstr("encryption header: "));
        const auto theirs = qemu_check("damaged", true, directory_.path());
        EXPECT_NE(theirs.status, 0) << theirs.text();
    }
}

TEST_F(DamagedHeadersTest, LuksIsNotGuessed) {
    EXPECT_THAT(tool({"read", "--key", "key", "disk", "0", "512"}).err, AllOf(HasSubstr("LUKS"), HasSubstr("-f raw")));
}

}  // namespace
}  // namespace qcow::test
