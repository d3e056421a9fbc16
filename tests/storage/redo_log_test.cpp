#include "storage/redo_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "base/bits.h"
#include "support/random.h"

namespace qcow {
namespace {

using test::Random;
using testing::ElementsAre;
using testing::IsEmpty;

/// Memory for a log, with what a killed process left in it.
struct LogMemory {
    std::vector<std::uint64_t> words = std::vector<std::uint64_t>(RedoLog::min_bytes / 8);

    [[nodiscard]] std::span<std::byte> bytes() { return std::as_writable_bytes(std::span(words)); }
    [[nodiscard]] SurvivingMemory surviving() { return {bytes(), nullptr}; }
    /// The values that the words get, in order.
    [[nodiscard]] std::vector<std::uint64_t> left() {
        std::vector<std::uint64_t> values;
        for (const auto& store : RedoLog::read(bytes())) values.push_back(store.after);
        return values;
    }
};

bool append_word(RedoLog& log, std::uint64_t at, std::uint64_t before, std::uint64_t after) {
    return log.append({at}, {&before, 1}, {&after, 1});
}

TEST(RedoLogTest, HoldsWordsWithTheirPlaces) {
    LogMemory memory;
    RedoLog log(memory.surviving());
    const std::vector<std::uint64_t> before = {1, 2};
    const std::vector<std::uint64_t> after = {3, 4};
    ASSERT_TRUE(log.append({64 * KiB}, before, after));
    const auto stores = RedoLog::read(memory.bytes());
    ASSERT_EQ(stores.size(), 2U);
    EXPECT_EQ(stores[0].at.value, 64 * KiB);
    EXPECT_EQ(stores[0].before, 1U);
    EXPECT_EQ(stores[0].after, 3U);
    EXPECT_EQ(stores[1].at.value, 64 * KiB + 8);
    EXPECT_EQ(stores[1].before, 2U);
    EXPECT_EQ(stores[1].after, 4U);
}

TEST(RedoLogTest, MemoryThatIsNoLogHasNothing) {
    LogMemory memory;
    EXPECT_THAT(memory.left(), IsEmpty());
    memory.words.assign(memory.words.size(), ~std::uint64_t{0});
    EXPECT_THAT(memory.left(), IsEmpty());
}

TEST(RedoLogTest, ANewLogIsEmpty) {
    LogMemory memory;
    RedoLog first(memory.surviving());
    ASSERT_TRUE(append_word(first, 8, 0, 1));
    const RedoLog second(memory.surviving());
    EXPECT_THAT(memory.left(), IsEmpty());
}

TEST(RedoLogTest, WhatWasWrittenLeavesIt) {
    LogMemory memory;
    RedoLog log(memory.surviving());
    std::uint64_t value = 0;
    for (int i = 0; i < 3; ++i) {
        ASSERT_TRUE(append_word(log, 8, 0, ++value));
        log.begin_writing();
        ASSERT_TRUE(append_word(log, 8, 0, ++value));
        EXPECT_THAT(memory.left(), testing::IsSupersetOf({value - 1, value})) << "until the pages are written";
        log.end_writing();
        EXPECT_THAT(memory.left(), ElementsAre(value));
    }
}

/// The pages of a write that failed are written by the next one.
TEST(RedoLogTest, NothingLeavesItWhereWritingFailed) {
    LogMemory memory;
    RedoLog log(memory.surviving());
    ASSERT_TRUE(append_word(log, 8, 0, 1));
    log.begin_writing();
    ASSERT_TRUE(append_word(log, 8, 1, 2));
    log.begin_writing();
    ASSERT_TRUE(append_word(log, 8, 2, 3));
    EXPECT_THAT(memory.left(), ElementsAre(1, 2, 3));
    log.end_writing();
    EXPECT_THAT(memory.left(), ElementsAre(2, 3)) << "the half that stores went to meanwhile";
    log.begin_writing();
    log.end_writing();
    EXPECT_THAT(memory.left(), IsEmpty());
}

TEST(RedoLogTest, RefusesWhatHasNoRoom) {
    LogMemory memory;
    RedoLog log(memory.surviving());
    const std::vector<std::uint64_t> page(512, 7);
    std::size_t stored = 0;
    while (log.append({4 * KiB}, page, page)) ++stored;
    EXPECT_EQ(stored, RedoLog::min_bytes / 2 / (16 * 512 + 16));
    EXPECT_EQ(memory.left().size(), stored * 512);
    log.begin_writing();
    EXPECT_TRUE(log.append({4 * KiB}, page, page));
}

TEST(RedoLogTest, NothingInTheMemoryIsTrusted) {
    auto random = Random::named("redo log");
    for (int round = 0; round < 2000; ++round) {
        LogMemory memory;
        RedoLog log(memory.surviving());
        for (int i = 0; i < 20; ++i) ASSERT_TRUE(append_word(log, random.below(bit(20)) * 8, 0, 1));
        const auto word = random.below(random.chance(50) ? 100 : memory.words.size());
        memory.words[word] = random.chance(50) ? ~std::uint64_t{0} : std::uint64_t{1} << random.below(64);
        for (const auto& store : RedoLog::read(memory.bytes())) {
            ASSERT_EQ(store.at.value % 8, 0U);
            ASSERT_LT(store.at.value, bit(56) + memory.bytes().size());
        }
    }
}

}  // namespace
}  // namespace qcow
