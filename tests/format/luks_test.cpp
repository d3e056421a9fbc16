#include "format/luks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/bytes.h"
#include "support/result.h"

namespace qcow::format {
namespace {

using namespace qcow::test;
using testing::ElementsAre;
using testing::IsEmpty;

Bytes padded(std::string_view text, std::size_t length) {
    return joined({text_bytes(text), repeated(length - text.size(), 0)});
}

Bytes key_slot(std::uint32_t state) { return joined({u32(state), u32(1000), repeated(32, 0x5a), u32(8), u32(4000)}); }
constexpr std::uint32_t enabled = 0x00ac71f3, disabled = 0x0000dead;

/// The header of AES-256-XTS with two of eight slots in use.
Bytes luks_header() {
    return joined({
        bytes({'L', 'U', 'K', 'S', 0xba, 0xbe}),             // magic
        u16(1),                                              // version
        padded("aes", 32),                                   // cipher
        padded("xts-plain64", 32),                           // mode
        padded("sha256", 32),                                // hash
        u32(4040),                                           // payload offset
        u32(64),                                             // key bytes
        repeated(20, 0xd1),                                  // digest
        repeated(32, 0x5a),                                  // salt
        u32(1000),                                           // iterations
        padded("01234567-89ab-cdef-0123-456789abcdef", 40),  // uuid
        key_slot(enabled),
        key_slot(disabled),
        key_slot(disabled),
        key_slot(enabled),
        key_slot(disabled),
        key_slot(disabled),
        key_slot(disabled),
        key_slot(disabled),
    });
}

TEST(Luks, TellsCipherHashAndKeySize) {
    const auto info = must(parse_luks1(luks_header()));
    EXPECT_EQ(info.method, "luks");
    EXPECT_EQ(info.cipher, "aes-xts-plain64");
    EXPECT_EQ(info.hash, "sha256");
    EXPECT_EQ(info.key_bits, 512U);
}

TEST(Luks, TellsTheSlotsInUse) {
    const auto info = must(parse_luks1(luks_header()));
    EXPECT_EQ(info.slots, 8U);
    EXPECT_THAT(info.used_slots, ElementsAre(0, 3));
}

TEST(Luks, ASlotThatIsNeitherEnabledNorDisabledIsNotInUse) {
    const auto odd = with_u32(with_u32(luks_header(), 208, 0), 208 + 3 * 48, 0xffffffff);
    EXPECT_THAT(must(parse_luks1(odd)).used_slots, IsEmpty());
    const auto last = with_u32(luks_header(), 208 + 7 * 48, enabled);
    EXPECT_THAT(must(parse_luks1(last)).used_slots, ElementsAre(0, 3, 7));
}

TEST(Luks, NamesMayFillTheirFields) {
    const auto info = must(parse_luks1(with(luks_header(), 72, repeated(32, 'h'))));
    EXPECT_EQ(info.hash, std::string(32, 'h'));
}

TEST(Luks, HeaderHas592Bytes) {
    ASSERT_EQ(luks_header().size(), 592U);
    EXPECT_TRUE(
        fails(parse_luks1(first(luks_header(), 591)), Errc::corrupt, {"LUKS header: 591 bytes instead of 592"}));
    EXPECT_TRUE(fails(parse_luks1({}), Errc::corrupt, {"LUKS header: 0 bytes"}));
    EXPECT_TRUE(parse_luks1(joined({luks_header(), repeated(1000, 0xff)})));
}

TEST(Luks, RefusesAnotherMagic) {
    EXPECT_TRUE(fails(parse_luks1(with_u8(luks_header(), 5, 0xbf)), Errc::corrupt, {"LUKS header", "does not begin"}));
    EXPECT_TRUE(fails(parse_luks1(repeated(592, 0)), Errc::corrupt, {"LUKS header"}));
}

TEST(Luks, RefusesOtherVersions) {
    EXPECT_TRUE(fails(parse_luks1(with_u16(luks_header(), 6, 2)), Errc::unsupported, {"LUKS header: version 2"}));
    EXPECT_TRUE(fails(parse_luks1(with_u16(luks_header(), 6, 0)), Errc::unsupported, {"LUKS header: version 0"}));
}

}  // namespace
}  // namespace qcow::format
