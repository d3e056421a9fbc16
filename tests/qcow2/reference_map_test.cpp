#include "qcow2/reference_map.h"

#include <gtest/gtest.h>

#include <latch>
#include <thread>
#include <vector>

#include "base/bits.h"
#include "support/result.h"

namespace qcow::qcow2 {
namespace {

using test::fails;
using test::must;

constexpr std::uint64_t chunk = ReferenceMap::chunk_clusters;
constexpr std::size_t budget = 64 * MiB;

TEST(ReferenceMapTest, AnEmptyOneHasNoReferences) {
    const auto map = must(ReferenceMap::create(3 * chunk + 5, budget));
    EXPECT_EQ(map->clusters(), 3 * chunk + 5);
    EXPECT_EQ(map->at(0).word, 0U);
    EXPECT_EQ(map->at(3 * chunk + 4).word, 0U);
    EXPECT_TRUE(map->chunk_from(chunk).empty());
    EXPECT_EQ(map->next_used(0, map->clusters()), map->clusters());
    const auto none = must(ReferenceMap::create(0, 0));
    EXPECT_EQ(none->at(0).word, 0U);
    EXPECT_EQ(none->next_used(0, 0), 0U);
}

TEST(ReferenceMapTest, PastItsEndThereAreNoReferences) {
    const auto map = must(ReferenceMap::create(10, budget));
    must(map->add(9, 1, 1, References::data));
    EXPECT_EQ(map->at(9).count(), 1U);
    EXPECT_EQ(map->at(10).word, 0U);
    EXPECT_EQ(map->at(~std::uint64_t{0}).word, 0U);
    EXPECT_EQ(map->next_used(10, 1000), 1000U);
    EXPECT_EQ(map->next_used(~std::uint64_t{0} - 1, ~std::uint64_t{0}), ~std::uint64_t{0});
}

TEST(ReferenceMapTest, CountsAddUpAndKindsAreKept) {
    const auto map = must(ReferenceMap::create(100, budget));
    must(map->add(7, 1, 2, References::data | References::copied));
    must(map->add(7, 1, 3, References::l2_table));
    EXPECT_EQ(map->at(7).count(), 5U);
    EXPECT_EQ(map->at(7).word & ~References::max_count, References::data | References::copied | References::l2_table);
    EXPECT_EQ(map->at(6).word, 0U);
    EXPECT_EQ(map->at(8).word, 0U);
}

TEST(ReferenceMapTest, ARunMayCrossChunks) {
    const auto map = must(ReferenceMap::create(4 * chunk, budget));
    must(map->add(chunk - 1, chunk + 2, 1, References::data));
    EXPECT_EQ(map->at(chunk - 2).count(), 0U);
    for (const auto cluster : {chunk - 1, chunk, 2 * chunk - 1, 2 * chunk}) EXPECT_EQ(map->at(cluster).count(), 1U);
    EXPECT_EQ(map->at(2 * chunk + 1).count(), 0U);
    EXPECT_TRUE(map->chunk_from(3 * chunk).empty());
}

/// Hostile images refer to a cluster more often than can be counted.
TEST(ReferenceMapTest, CountsStopAtTheirMaximum) {
    const auto map = must(ReferenceMap::create(3, budget));
    must(map->add(0, 1, References::max_count - 1, References::metadata));
    must(map->add(0, 1, 1, References::metadata));
    EXPECT_EQ(map->at(0).word, References::metadata | References::max_count);
    must(map->add(0, 1, 1, References::metadata));
    EXPECT_EQ(map->at(0).word, References::metadata | References::max_count);
    must(map->add(1, 1, 5, References::compressed));
    must(map->add(1, 1, ~std::uint64_t{0}, References::compressed));
    EXPECT_EQ(map->at(1).word, References::compressed | References::max_count);
    must(map->add(2, 1, std::uint64_t{1} << 32, References::compressed));
    EXPECT_EQ(map->at(2).word, References::compressed | References::max_count);
}

TEST(ReferenceMapTest, AChunkIsSeenFromAClusterOnToItsEnd) {
    const auto map = must(ReferenceMap::create(4 * chunk, budget));
    must(map->add(chunk + 10, 1, 4, References::data));
    const auto all = map->chunk_from(chunk);
    ASSERT_EQ(all.size(), chunk);
    EXPECT_EQ(all[10].count(), 4U);
    EXPECT_EQ(all[11].count(), 0U);
    const auto rest = map->chunk_from(chunk + 10);
    ASSERT_EQ(rest.size(), chunk - 10);
    EXPECT_EQ(rest.front().count(), 4U);
    EXPECT_EQ(map->chunk_from(2 * chunk - 1).size(), 1U);
}

TEST(ReferenceMapTest, TheNextUsedClusterIsFound) {
    const auto map = must(ReferenceMap::create(8 * chunk, budget));
    must(map->add(5, 1, 1, References::data));
    must(map->add(6 * chunk, 1, 1, References::data));
    EXPECT_EQ(map->next_used(0, 8 * chunk), 5U);
    EXPECT_EQ(map->next_used(5, 8 * chunk), 5U);
    EXPECT_EQ(map->next_used(6, 8 * chunk), 6 * chunk);
    EXPECT_EQ(map->next_used(6 * chunk, 6 * chunk + 1), 6 * chunk);
    EXPECT_EQ(map->next_used(6 * chunk + 1, 8 * chunk), 8 * chunk);
    EXPECT_EQ(map->next_used(0, 5), 5U) << "`last` itself is not looked at";
    EXPECT_EQ(map->next_used(6, 6 * chunk), 6 * chunk);
    EXPECT_EQ(map->next_used(0, 3), 3U);
    EXPECT_EQ(map->next_used(7, 7), 7U);
}

/// A file of 2^52 bytes that is nearly all hole.
TEST(ReferenceMapTest, LongHolesAreSkippedAndTakeNoMemory) {
    constexpr std::uint64_t clusters = std::uint64_t{1} << 36;
    const auto map = must(ReferenceMap::create(clusters, MiB));
    must(map->add(clusters - 1, 1, 1, References::data));
    must(map->add(clusters / 2 + 3, 1, 1, References::l2_table));
    EXPECT_EQ(map->next_used(0, clusters), clusters / 2 + 3);
    EXPECT_EQ(map->next_used(clusters / 2 + 4, clusters), clusters - 1);
    EXPECT_EQ(map->at(clusters - 1).count(), 1U);
}

TEST(ReferenceMapTest, MemoryIsHeldToTheBudget) {
    const auto map = must(ReferenceMap::create(1000 * chunk, MiB));
    std::uint64_t chunks = 0;
    Result<void> added;
    while ((added = map->add(chunks * chunk, 1, 1, References::data))) ++chunks;
    EXPECT_TRUE(fails(added, Errc::limit_exceeded, {"1024 KiB"}));
    EXPECT_LE(chunks * chunk * 4, MiB);
    EXPECT_GE(chunks * chunk * 4, MiB - 64 * KiB);
    // What has memory goes on counting.
    must(map->add(0, chunks * chunk, 1, References::data));
    EXPECT_EQ(map->at(0).count(), 2U);
    EXPECT_EQ(map->at(1).count(), 1U);
    EXPECT_TRUE(fails(map->add(chunks * chunk - 1, 2, 1, References::data), Errc::limit_exceeded));
    EXPECT_EQ(map->at(chunks * chunk).count(), 0U);
}

TEST(ReferenceMapTest, AnEmptyMapMayBeTooLargeAlready) {
    EXPECT_TRUE(fails(ReferenceMap::create(std::uint64_t{1} << 55, MiB), Errc::limit_exceeded, {"1024 KiB"}));
    EXPECT_TRUE(fails(ReferenceMap::create(~std::uint64_t{0}, MiB), Errc::limit_exceeded));
    EXPECT_TRUE(fails(ReferenceMap::create(1, 7), Errc::limit_exceeded));
    const auto map = must(ReferenceMap::create(1, 8));
    EXPECT_TRUE(fails(map->add(0, 1, 1, References::data), Errc::limit_exceeded));
    must(map->add(0, 0, 1, References::data));
}

/// In the same chunks, which are new to all of them.
TEST(ReferenceMapTest, ThreadsCountTogether) {
    constexpr unsigned threads = 4;
    constexpr std::uint64_t chunks = 500;
    const auto map = must(ReferenceMap::create(chunks * chunk, budget));
    {
        std::latch all_there(threads);
        std::vector<std::jthread> counting;
        for (unsigned thread = 0; thread < threads; ++thread) {
            counting.emplace_back([&] {
                all_there.arrive_and_wait();
                for (std::uint64_t i = 0; i < chunks; ++i) {
                    EXPECT_TRUE(map->add(i * chunk, 3, 1, References::data));
                    for (int n = 0; n < 20; ++n) EXPECT_TRUE(map->add(chunk - 10, 10, 1, References::metadata));
                }
            });
        }
    }
    for (std::uint64_t i = 0; i < chunks; ++i) EXPECT_EQ(map->at(i * chunk + 2).count(), threads);
    EXPECT_EQ(map->at(chunk - 1).count(), threads * chunks * 20);
}

}  // namespace
}  // namespace qcow::qcow2
