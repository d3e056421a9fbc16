#include "format/refcount.h"

#include <gtest/gtest.h>

#include "support/bytes.h"

namespace qcow::format {
namespace {

using test::bytes;

TEST(RefcountTableEntry, Bits9To63AreTheBlocksOffset) {
    EXPECT_FALSE(RefcountTableEntry{0}.allocated());
    EXPECT_EQ(RefcountTableEntry{0x20000}.block(), HostOffset{0x20000});
    EXPECT_TRUE(RefcountTableEntry{0x20000}.allocated());
    EXPECT_EQ(RefcountTableEntry{~std::uint64_t{0}}.block(), HostOffset{0xffff'ffff'ffff'fe00});
}

TEST(RefcountTableEntry, Bits0To8AreReserved) {
    EXPECT_TRUE(RefcountTableEntry{0x20001}.reserved_bits_set());
    EXPECT_TRUE(RefcountTableEntry{0x20100}.reserved_bits_set());
    EXPECT_FALSE(RefcountTableEntry{0x20200}.reserved_bits_set());
    EXPECT_FALSE(RefcountTableEntry{0x1ff}.allocated());
}

TEST(Refcounts, ABlockIsOneCluster) {
    EXPECT_EQ(refcounts_per_block(16, 4), 32768U);
    EXPECT_EQ(refcounts_per_block(16, 0), 524288U);
    EXPECT_EQ(refcounts_per_block(16, 6), 8192U);
    EXPECT_EQ(refcounts_per_block(9, 6), 64U);
    EXPECT_EQ(refcounts_per_block(21, 0), 16777216U);
}

TEST(Refcounts, Of1BitArePackedFromTheLeastSignificantBit) {
    const auto block = bytes({0b0000'0101, 0b1000'0000});
    EXPECT_EQ(refcount_at(block, 0, 0), 1U);
    EXPECT_EQ(refcount_at(block, 1, 0), 0U);
    EXPECT_EQ(refcount_at(block, 2, 0), 1U);
    EXPECT_EQ(refcount_at(block, 7, 0), 0U);
    EXPECT_EQ(refcount_at(block, 8, 0), 0U);
    EXPECT_EQ(refcount_at(block, 15, 0), 1U);
}

TEST(Refcounts, Of2BitsArePackedFromTheLeastSignificantBit) {
    const auto block = bytes({0b11'10'01'00, 0b00'00'00'10});
    EXPECT_EQ(refcount_at(block, 0, 1), 0U);
    EXPECT_EQ(refcount_at(block, 1, 1), 1U);
    EXPECT_EQ(refcount_at(block, 2, 1), 2U);
    EXPECT_EQ(refcount_at(block, 3, 1), 3U);
    EXPECT_EQ(refcount_at(block, 4, 1), 2U);
    EXPECT_EQ(refcount_at(block, 5, 1), 0U);
}

TEST(Refcounts, Of4BitsArePackedFromTheLeastSignificantBit) {
    const auto block = bytes({0xa1, 0x0f});
    EXPECT_EQ(refcount_at(block, 0, 2), 1U);
    EXPECT_EQ(refcount_at(block, 1, 2), 10U);
    EXPECT_EQ(refcount_at(block, 2, 2), 15U);
    EXPECT_EQ(refcount_at(block, 3, 2), 0U);
}

TEST(Refcounts, Of8Bits) {
    const auto block = bytes({0x01, 0xff});
    EXPECT_EQ(refcount_at(block, 0, 3), 1U);
    EXPECT_EQ(refcount_at(block, 1, 3), 255U);
}

TEST(Refcounts, Of16BitsAreBigEndian) {
    const auto block = bytes({0x00, 0x01, 0xff, 0xfe});
    EXPECT_EQ(refcount_at(block, 0, 4), 1U);
    EXPECT_EQ(refcount_at(block, 1, 4), 0xfffeU);
}

TEST(Refcounts, Of32BitsAreBigEndian) {
    const auto block = bytes({0x00, 0x00, 0x00, 0x01, 0x80, 0x00, 0x00, 0x02});
    EXPECT_EQ(refcount_at(block, 0, 5), 1U);
    EXPECT_EQ(refcount_at(block, 1, 5), 0x80000002U);
}

TEST(Refcounts, Of64BitsAreBigEndian) {
    const auto block = bytes({0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01,  //
                              0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe});
    EXPECT_EQ(refcount_at(block, 0, 6), 1U);
    EXPECT_EQ(refcount_at(block, 1, 6), 0xffff'ffff'ffff'fffeU);
}

}  // namespace
}  // namespace qcow::format
