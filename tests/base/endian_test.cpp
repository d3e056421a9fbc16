#include "base/endian.h"

#include <gtest/gtest.h>

#include "support/bytes.h"

namespace qcow {
namespace {

using test::bytes;
using test::Bytes;

const Bytes counting = bytes({0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x88});

TEST(Endian, LoadsTheMostSignificantByteFirst) {
    EXPECT_EQ(load_be<std::uint8_t>(counting, 8), 0x88U);
    EXPECT_EQ(load_be<std::uint16_t>(counting, 1), 0x0102U);
    EXPECT_EQ(load_be<std::uint32_t>(counting, 1), 0x01020304U);
    EXPECT_EQ(load_be<std::uint64_t>(counting, 1), 0x0102'0304'0506'0788U);
}

TEST(Endian, LoadsUpToTheLastByte) {
    EXPECT_EQ(load_be<std::uint16_t>(counting, 7), 0x0788U);
    EXPECT_EQ(load_be<std::uint64_t>(counting, 1) & 0xff, 0x88U);
}

TEST(Endian, StoresTheMostSignificantByteFirst) {
    Bytes out = test::repeated(10, 0xee);
    store_be<std::uint32_t>(out, 1, 0x01020304);
    store_be<std::uint16_t>(out, 5, 0x0506);
    store_be<std::uint8_t>(out, 7, 0x07);
    EXPECT_EQ(out, bytes({0xee, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0xee, 0xee}));
    store_be<std::uint64_t>(out, 2, 0xf1f2'f3f4'f5f6'f7f8);
    EXPECT_EQ(out, bytes({0xee, 0x01, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8}));
}

}  // namespace
}  // namespace qcow
