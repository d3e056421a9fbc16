#include "format/geometry.h"

#include <gtest/gtest.h>

namespace qcow::format {
namespace {

Geometry geometry(unsigned cluster_bits, bool extended_l2 = false) {
    Header h;
    h.cluster_bits = cluster_bits;
    h.incompatible = extended_l2 ? incompatible::extended_l2 : 0;
    return Geometry(h);
}

TEST(Geometry, OfTheUsualClusters) {
    const auto g = geometry(16);
    EXPECT_EQ(g.cluster_size(), 65536U);
    EXPECT_EQ(g.subcluster_bits(), 16U);
    EXPECT_EQ(g.entry_words(), 1U);
    EXPECT_EQ(g.l2_entries(), 8192U);
    EXPECT_EQ(g.l2_coverage(), 512U << 20);
}

TEST(Geometry, OfTheSmallestAndTheLargestClusters) {
    EXPECT_EQ(geometry(9).l2_entries(), 64U);
    EXPECT_EQ(geometry(9).l2_coverage(), 32768U);
    EXPECT_EQ(geometry(21).l2_entries(), 262144U);
    EXPECT_EQ(geometry(21).l2_coverage(), std::uint64_t{512} << 30);
}

TEST(Geometry, ExtendedEntriesTakeTwoWordsAndMap32Subclusters) {
    const auto g = geometry(16, true);
    EXPECT_EQ(g.entry_words(), 2U);
    EXPECT_EQ(g.l2_entries(), 4096U);
    EXPECT_EQ(g.l2_coverage(), 256U << 20);
    EXPECT_EQ(g.subcluster_bits(), 11U);
}

TEST(Geometry, DividesAGuestOffset) {
    // 0x1'2345'6789 = 9 * 512 MiB + 0x345 * 64 KiB + 0x6789
    const auto g = geometry(16);
    const GuestOffset at{0x1'2345'6789};
    EXPECT_EQ(g.l1_index(at), 9U);
    EXPECT_EQ(g.l2_index(at), 0x345U);
    EXPECT_EQ(g.offset_in_cluster(at.value), 0x6789U);
}

TEST(Geometry, DividesAGuestOffsetForExtendedEntries) {
    // 0x1'2345'6789 = 18 * 256 MiB + 0x345 * 64 KiB + 0x6789
    const auto g = geometry(16, true);
    const GuestOffset at{0x1'2345'6789};
    EXPECT_EQ(g.l1_index(at), 18U);
    EXPECT_EQ(g.l2_index(at), 0x345U);
}

TEST(Geometry, TheNextTableBeginsWhereOneEnds) {
    const auto g = geometry(9);
    EXPECT_EQ(g.l1_index({32767}), 0U);
    EXPECT_EQ(g.l2_index({32767}), 63U);
    EXPECT_EQ(g.l1_index({32768}), 1U);
    EXPECT_EQ(g.l2_index({32768}), 0U);
}

TEST(Geometry, CountsClustersUpwards) {
    const auto g = geometry(16);
    EXPECT_EQ(g.clusters(0), 0U);
    EXPECT_EQ(g.clusters(1), 1U);
    EXPECT_EQ(g.clusters(65536), 1U);
    EXPECT_EQ(g.clusters(65537), 2U);
    EXPECT_EQ(g.clusters(~std::uint64_t{0}), std::uint64_t{1} << 48);
}

}  // namespace
}  // namespace qcow::format
