#include "format/qcow1.h"

#include <gtest/gtest.h>

#include "support/bytes.h"
#include "support/result.h"

namespace qcow::format {
namespace {

using namespace qcow::test;

constexpr std::uint64_t all_ones = ~std::uint64_t{0};
constexpr std::uint64_t file_size = 1 << 20;
constexpr std::size_t version_at = 4, backing_offset_at = 8, backing_size_at = 16, size_at = 24, cluster_bits_at = 32,
                      l2_bits_at = 33, crypt_at = 36, l1_offset_at = 40;

/// Clusters of 4 KiB, L2 tables of 512 entries that map 2 MiB each, and a virtual size of 4 MiB.
Bytes qcow1_header() {
    return joined({
        bytes({0x51, 0x46, 0x49, 0xfb}), u32(1),  // magic, version
        u64(0), u32(0),                           // backing offset and size
        u32(0),                                   // mtime
        u64(4 << 20),                             // size
        u8(12), u8(9), u16(0),                    // cluster_bits, l2_bits, padding
        u32(0),                                   // crypt_method
        u64(48),                                  // l1_table_offset: right behind the header, not aligned
    });
}

Result<Qcow1Header> parse(const Bytes& in) { return parse_qcow1_header(in, file_size); }

TEST(Qcow1Header, IsReadWithAllItsFields) {
    const auto h = must(parse(qcow1_header()));
    EXPECT_EQ(h.size, 4U << 20);
    EXPECT_EQ(h.cluster_bits, 12U);
    EXPECT_EQ(h.l2_bits, 9U);
    EXPECT_EQ(h.cluster_size(), 4096U);
    EXPECT_EQ(h.l2_coverage(), 2U << 20);
    EXPECT_EQ(h.l1_entries(), 2U);
    EXPECT_EQ(h.l1_table, HostOffset{48});
    EXPECT_EQ(h.backing_name_offset, 0U);
    EXPECT_FALSE(h.encrypted);
}

TEST(Qcow1Header, Has48Bytes) {
    ASSERT_EQ(qcow1_header().size(), 48U);
    EXPECT_TRUE(fails(parse(first(qcow1_header(), 47)), Errc::corrupt, {"header: the file has 47 bytes"}));
}

TEST(Qcow1Header, RefusesAnotherMagic) {
    EXPECT_TRUE(fails(parse(with_u8(qcow1_header(), 0, 0x50)), Errc::corrupt, {"header field magic (byte 0)"}));
}

TEST(Qcow1Header, RefusesOtherVersions) {
    EXPECT_TRUE(fails(parse(with_u32(qcow1_header(), version_at, 2)), Errc::unsupported,
                      {"header field version (byte 4): 2 is not 1"}));
    EXPECT_TRUE(fails(parse(with_u32(qcow1_header(), version_at, 0)), Errc::unsupported, {"version (byte 4): 0"}));
}

TEST(Qcow1Header, ClusterBitsAreFrom9To16) {
    const auto with_bits = [](std::uint8_t bits) { return with_u8(qcow1_header(), cluster_bits_at, bits); };
    EXPECT_EQ(must(parse(with_bits(9))).cluster_size(), 512U);
    EXPECT_EQ(must(parse(with_bits(16))).cluster_size(), 65536U);
    EXPECT_TRUE(fails(parse(with_bits(8)), Errc::corrupt, {"header field cluster_bits (byte 32): 8"}));
    EXPECT_TRUE(fails(parse(with_bits(17)), Errc::corrupt, {"header field cluster_bits (byte 32): 17"}));
    EXPECT_TRUE(fails(parse(with_bits(255)), Errc::corrupt, {"header field cluster_bits (byte 32): 255"}));
}

TEST(Qcow1Header, L2BitsAreFrom6To13) {
    const auto with_bits = [](std::uint8_t bits) { return with_u8(qcow1_header(), l2_bits_at, bits); };
    EXPECT_EQ(must(parse(with_bits(6))).l2_coverage(), 64U * 4096);
    EXPECT_EQ(must(parse(with_bits(13))).l2_coverage(), 8192U * 4096);
    EXPECT_TRUE(fails(parse(with_bits(5)), Errc::corrupt, {"header field l2_bits (byte 33): 5"}));
    EXPECT_TRUE(fails(parse(with_bits(14)), Errc::corrupt, {"header field l2_bits (byte 33): 14"}));
}

TEST(Qcow1Header, CryptMethods) {
    EXPECT_TRUE(must(parse(with_u32(qcow1_header(), crypt_at, 1))).encrypted);
    EXPECT_TRUE(fails(parse(with_u32(qcow1_header(), crypt_at, 2)), Errc::unsupported,
                      {"header field crypt_method (byte 36): 2"}));
}

TEST(Qcow1Header, BackingFileNameHasAtMost1023Bytes) {
    const auto in = with_u64(qcow1_header(), backing_offset_at, 0x200);
    const auto h = must(parse(with_u32(in, backing_size_at, 1023)));
    EXPECT_EQ(h.backing_name_offset, 0x200U);
    EXPECT_EQ(h.backing_name_length, 1023U);
    EXPECT_TRUE(fails(parse(with_u32(in, backing_size_at, 1024)), Errc::corrupt,
                      {"header field backing_file_offset (byte 8)", "1024 bytes at 0x200"}));
    EXPECT_TRUE(
        fails(parse(with_u32(in, backing_size_at, 0xffffffff)), Errc::corrupt, {"backing_file_offset (byte 8)"}));
}

TEST(Qcow1Header, BackingFileNameLiesInTheFile) {
    const auto in = with_u32(qcow1_header(), backing_size_at, 8);
    const auto with_offset = [&](std::uint64_t at) { return with_u64(in, backing_offset_at, at); };
    EXPECT_TRUE(parse(with_offset(file_size - 8)));
    EXPECT_TRUE(fails(parse(with_offset(file_size - 7)), Errc::corrupt, {"backing_file_offset (byte 8)"}));
    EXPECT_TRUE(fails(parse(with_offset(all_ones - 3)), Errc::corrupt, {"backing_file_offset (byte 8)"}));
}

TEST(Qcow1Header, SizeIsThatOfADisk) {
    EXPECT_TRUE(fails(parse(with_u64(qcow1_header(), size_at, std::uint64_t{1} << 63)), Errc::corrupt,
                      {"header field size (byte 24)"}));
    EXPECT_TRUE(fails(parse(with_u64(qcow1_header(), size_at, all_ones)), Errc::corrupt, {"size (byte 24)"}));
}

TEST(Qcow1Header, L1TableHasAtMost32MiB) {
    // 4 Mi entries of 2 MiB each.
    const std::uint64_t most = std::uint64_t{4 << 20} << 21;
    EXPECT_EQ(must(parse_qcow1_header(with_u64(qcow1_header(), size_at, most), 1 << 30)).l1_entries(), 4U << 20);
    EXPECT_TRUE(fails(parse_qcow1_header(with_u64(qcow1_header(), size_at, most + 1), 1 << 30), Errc::limit_exceeded,
                      {"header field size (byte 24)", "more than 32 MiB"}));
}

TEST(Qcow1Header, L1TableLiesBehindTheHeader) {
    const auto with_offset = [](std::uint64_t at) { return with_u64(qcow1_header(), l1_offset_at, at); };
    EXPECT_TRUE(parse(with_offset(file_size)));  // the header can be read all the same
    EXPECT_TRUE(fails(parse(with_offset(0)), Errc::corrupt, {"header field l1_table_offset (byte 40)"}));
    EXPECT_TRUE(fails(parse(with_offset(all_ones - 7)), Errc::corrupt, {"header field l1_table_offset (byte 40)"}));
}

TEST(Qcow1Header, ADiskOfNoBytesNeedsNoL1Table) {
    const auto in = with_u64(with_u64(qcow1_header(), size_at, 0), l1_offset_at, 0);
    EXPECT_EQ(must(parse(in)).l1_entries(), 0U);
}

TEST(Qcow1Header, APartOfATableIsATable) {
    EXPECT_EQ(must(parse(with_u64(qcow1_header(), size_at, (4 << 20) - 1))).l1_entries(), 2U);
    EXPECT_EQ(must(parse(with_u64(qcow1_header(), size_at, (4 << 20) + 1))).l1_entries(), 3U);
}

TEST(Qcow1Entry, AllZerosIsUnallocated) {
    EXPECT_FALSE(Qcow1Entry{0}.allocated());
    EXPECT_FALSE(Qcow1Entry{0}.compressed());
}

TEST(Qcow1Entry, IsTheHostOffset) {
    const Qcow1Entry entry{0x12000};
    EXPECT_TRUE(entry.allocated());
    EXPECT_FALSE(entry.compressed());
    EXPECT_EQ(entry.cluster(), HostOffset{0x12000});
}

TEST(Qcow1Entry, CompressedHasTheLengthAboveTheOffset) {
    // Clusters of 4 KiB: the length in the 12 bits from 51 on.
    const Qcow1Entry entry{bit(63) | std::uint64_t{0x321} << 51 | 0x12345};
    EXPECT_TRUE(entry.compressed());
    EXPECT_TRUE(entry.allocated());
    EXPECT_EQ(entry.compressed_range(12), (CompressedRange{{0x12345}, 0x321}));
}

TEST(Qcow1Entry, CompressedFieldsHaveTheirWholeWidth) {
    EXPECT_EQ(Qcow1Entry{all_ones}.compressed_range(9), (CompressedRange{{bit(54) - 1}, 511}));
    EXPECT_EQ(Qcow1Entry{all_ones}.compressed_range(16), (CompressedRange{{bit(47) - 1}, 65535}));
}

}  // namespace
}  // namespace qcow::format
