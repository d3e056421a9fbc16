#include "base/bits.h"

#include <gtest/gtest.h>

#include <cstdint>

#include "support/bytes.h"

namespace qcow {
namespace {

using test::bytes;
using test::repeated;
using test::with_u8;

constexpr std::uint64_t largest = ~std::uint64_t{0};

TEST(Bits, NamesSingleBitsAndLowBits) {
    EXPECT_EQ(bit(0), 1U);
    EXPECT_EQ(bit(63), 0x8000'0000'0000'0000U);
    EXPECT_EQ(low_bits(0), 0U);
    EXPECT_EQ(low_bits(9), 0x1ffU);
    EXPECT_EQ(low_bits(63), 0x7fff'ffff'ffff'ffffU);
}

TEST(Bits, AlignsToPowersOfTwo) {
    EXPECT_TRUE(is_aligned(0, 512));
    EXPECT_TRUE(is_aligned(1024, 512));
    EXPECT_FALSE(is_aligned(1025, 512));
    EXPECT_TRUE(is_aligned(largest, 1));
    EXPECT_EQ(align_down(511, 512), 0U);
    EXPECT_EQ(align_down(512, 512), 512U);
    EXPECT_EQ(align_down(largest, 512), 0xffff'ffff'ffff'fe00U);
}

TEST(Bits, DividesUpwards) {
    EXPECT_EQ(divide_up(0, 512), 0U);
    EXPECT_EQ(divide_up(1, 512), 1U);
    EXPECT_EQ(divide_up(512, 512), 1U);
    EXPECT_EQ(divide_up(513, 512), 2U);
}

TEST(Bits, DividesUpwardsWithoutOverflow) {
    EXPECT_EQ(divide_up(largest, 512), 0x80'0000'0000'0000U);
    EXPECT_EQ(divide_up(largest, 1), largest);
    EXPECT_EQ(divide_up(largest, largest), 1U);
}

TEST(Bits, TellsWhetherARangeLiesWithinAnother) {
    EXPECT_TRUE(lies_within(0, 100, 100));
    EXPECT_TRUE(lies_within(99, 1, 100));
    EXPECT_TRUE(lies_within(100, 0, 100));
    EXPECT_FALSE(lies_within(99, 2, 100));
    EXPECT_FALSE(lies_within(101, 0, 100));
}

TEST(Bits, ARangeThatWrapsAroundLiesWithinNothing) {
    EXPECT_FALSE(lies_within(50, largest, 100));
    EXPECT_FALSE(lies_within(largest, 2, 100));
    EXPECT_FALSE(lies_within(2, largest - 1, largest));
}

TEST(IsZero, HoldsForNoBytesAtAll) { EXPECT_TRUE(is_zero({})); }

TEST(IsZero, HoldsForZerosOfAnyLength) {
    EXPECT_TRUE(is_zero(repeated(1, 0)));
    EXPECT_TRUE(is_zero(repeated(15, 0)));
    EXPECT_TRUE(is_zero(repeated(16, 0)));
    EXPECT_TRUE(is_zero(repeated(17, 0)));
    EXPECT_TRUE(is_zero(repeated(65536, 0)));
}

TEST(IsZero, SeesASingleByteWhereverItIs) {
    const auto zeros = repeated(100, 0);
    for (std::size_t at = 0; at < zeros.size(); ++at) EXPECT_FALSE(is_zero(with_u8(zeros, at, 0x80))) << at;
}

TEST(IsZero, IsNotFooledByBytesThatRepeat) {
    // The comparison with itself, shifted, holds for these as well.
    EXPECT_FALSE(is_zero(repeated(64, 0x55)));
    EXPECT_FALSE(is_zero(repeated(1, 1)));
}

TEST(AsBytes, IsTheTextWithoutATerminator) {
    const auto view = as_bytes("QFI\xfb");
    EXPECT_EQ(test::Bytes(view.begin(), view.end()), bytes({0x51, 0x46, 0x49, 0xfb}));
}

}  // namespace
}  // namespace qcow
