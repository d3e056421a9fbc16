#include "storage/word_cache.h"

#include <gtest/gtest.h>

#include <atomic>
#include <barrier>
#include <thread>
#include <vector>

#include "base/buffers.h"
#include "base/try.h"
#include "support/bytes.h"
#include "support/result.h"
#include "support/sample.h"

namespace qcow {
namespace {

using namespace qcow::test;

/// The word at offset 8 * n is scrambled(n). Counts reads, and fails them on demand.
class WordStorage final : public Storage {
public:
    explicit WordStorage(std::uint64_t size) : size_(size) {}

    [[nodiscard]] const std::string& name() const override { return name_; }
    [[nodiscard]] std::string identity() const override { return name_; }
    [[nodiscard]] Result<std::uint64_t> size() const override { return size_; }
    [[nodiscard]] Result<std::uint64_t> allocated() const override { return size_; }
    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        ++reads;
        if (broken || at.value + to.size() > broken_from) return fail(Errc::io, name_, "broken");
        std::size_t there = 0;
        std::uint64_t word = 0;
        Bytes bytes(to.size());
        for (std::size_t i = 0; i < to.size(); ++i) {
            const auto offset = at.value + i;
            const bool inside = offset < size_;
            if (i % 8 == 0) word = scrambled(offset / 8);  // pages begin at multiples of 8
            bytes[i] = inside ? static_cast<std::byte>(word >> (56 - offset % 8 * 8)) : std::byte{0};
            there += inside ? 1 : 0;
        }
        scatter(bytes, to);
        return there;
    }
    Result<void> write(HostOffset, ConstBuffers) override { return no(); }
    Result<void> write_zeroes(HostOffset, std::uint64_t) override { return no(); }
    Result<void> allocate(HostOffset at, std::uint64_t length) override {
        if (full) return fail(Errc::no_space, name_, "full");
        spaces.emplace_back(at.value, length);
        return {};
    }
    Result<void> resize(std::uint64_t) override { return no(); }
    Result<void> flush() override { return no(); }
    [[nodiscard]] Result<Run> run(HostOffset, std::uint64_t limit) const override { return Run{true, limit}; }

    mutable std::atomic<int> reads = 0;
    std::atomic<bool> broken = false;
    std::uint64_t broken_from = ~std::uint64_t{0};
    bool full = false;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> spaces;  // offset and length of what was allocated

private:
    static Result<void> no() { return fail(Errc::read_only, "words", "only read here"); }

    std::uint64_t size_;
    std::string name_ = "words";
};

std::shared_ptr<WordStorage> words(std::uint64_t size = 1 << 20) { return std::make_shared<WordStorage>(size); }

TEST(WordCache, TurnsBigEndianWordsIntoNumbers) {
    auto storage = memory_storage(joined({u64(1), u64(0x0102'0304'0506'0708), u64(~std::uint64_t{0})}));
    WordCache cache(storage, 512, 65536);
    EXPECT_EQ(must(cache.load({0})), 1U);
    EXPECT_EQ(must(cache.load({8})), 0x0102'0304'0506'0708U);
    EXPECT_EQ(must(cache.load({16})), ~std::uint64_t{0});
}

TEST(WordCache, GivesTheWordsUpToTheEndOfThePage) {
    WordCache cache(words(), 512, 65536);
    std::vector<std::uint64_t> to(100);
    // The page of byte 512 has 64 words, of which 60 lie from byte 544 on.
    EXPECT_EQ(must(cache.load({544}, to)), 60U);
    EXPECT_EQ(to[0], scrambled(68));
    EXPECT_EQ(to[59], scrambled(127));
    EXPECT_EQ(to[60], 0U);
}

TEST(WordCache, GivesNoMoreWordsThanAreAskedFor) {
    WordCache cache(words(), 4096, 65536);
    std::vector<std::uint64_t> to(3);
    EXPECT_EQ(must(cache.load({4096}, to)), 3U);
    EXPECT_EQ(to, (std::vector{scrambled(512), scrambled(513), scrambled(514)}));
    EXPECT_EQ(must(cache.load({8184}, to)), 1U);
    EXPECT_EQ(to[0], scrambled(1023));
}

TEST(WordCache, ReadsAPageOnce) {
    const auto storage = words();
    WordCache cache(storage, 4096, 65536);
    EXPECT_EQ(must(cache.load({0})), scrambled(0));
    EXPECT_EQ(must(cache.load({4088})), scrambled(511));
    EXPECT_EQ(must(cache.load({0})), scrambled(0));
    EXPECT_EQ(storage->reads, 1);
    EXPECT_EQ(must(cache.load({4096})), scrambled(512));
    EXPECT_EQ(storage->reads, 2);
}

TEST(WordCache, WordsPastTheEndAreZeros) {
    // The file ends in the middle of a page, and of a word.
    WordCache cache(words(512 + 12), 512, 65536);
    EXPECT_EQ(must(cache.load({512})), scrambled(64));
    EXPECT_EQ(must(cache.load({520})), scrambled(65) & 0xffff'ffff'0000'0000);
    EXPECT_EQ(must(cache.load({528})), 0U);
    EXPECT_EQ(must(cache.load({1 << 30})), 0U);
}

TEST(WordCache, ReachesAsFarAsAnEntryCanPoint) {
    WordCache cache(words(~std::uint64_t{0}), 512, 65536);
    const std::uint64_t last = (std::uint64_t{1} << 56) - 8;
    EXPECT_EQ(must(cache.load({last})), scrambled(last / 8));
    EXPECT_EQ(must(cache.load({0})), scrambled(0));
}

TEST(WordCache, KeepsAsManyPagesAsItsBudgetAllows) {
    // Room for eight pages, and eight pages are asked for.
    const auto storage = words();
    WordCache cache(storage, 512, 8 * 512);
    for (std::uint64_t page = 0; page < 8; ++page) EXPECT_EQ(must(cache.load({page * 512})), scrambled(page * 64));
    EXPECT_EQ(storage->reads, 8);
    for (std::uint64_t page = 0; page < 8; ++page) EXPECT_EQ(must(cache.load({page * 512})), scrambled(page * 64));
    EXPECT_EQ(storage->reads, 8);
}

TEST(WordCache, GivesUpAPageForOneMore) {
    const auto storage = words();
    WordCache cache(storage, 512, 8 * 512);
    for (std::uint64_t page = 0; page < 9; ++page) EXPECT_EQ(must(cache.load({page * 512})), scrambled(page * 64));
    EXPECT_EQ(storage->reads, 9);
    // The ninth page took the place of the first.
    EXPECT_EQ(must(cache.load({8 * 512})), scrambled(8 * 64));
    EXPECT_EQ(must(cache.load({1 * 512})), scrambled(1 * 64));
    EXPECT_EQ(storage->reads, 9);
    EXPECT_EQ(must(cache.load({0})), scrambled(0));
    EXPECT_EQ(storage->reads, 10);
}

TEST(WordCache, WorksWithNoBudgetAtAll) {
    WordCache cache(words(), 4096, 0);
    for (std::uint64_t at = 0; at < 1 << 20; at += 4096 + 8) EXPECT_EQ(must(cache.load({at})), scrambled(at / 8));
}

TEST(WordCache, ALargeBudgetTakesNoMemoryUntilItIsUsed) {
    // More than there is; only what is touched counts.
    WordCache cache(words(), 4096, std::size_t{4} << 30);
    EXPECT_EQ(must(cache.load({8})), scrambled(1));
}

TEST(WordCache, PagesAtTheSameDistanceDoNotCrowdEachOtherOut) {
    // Tables lie at multiples of the cluster size: 64 pages at a distance of 64 KiB, in a cache for 256.
    const auto storage = words(64 << 20);
    WordCache cache(storage, 512, 256 * 512);
    for (std::uint64_t n = 0; n < 64; ++n) must(cache.load({n * 65536}));
    for (std::uint64_t n = 0; n < 64; ++n) EXPECT_EQ(must(cache.load({n * 65536})), scrambled(n * 8192));
    EXPECT_LT(storage->reads, 64 + 16);
}

TEST(WordCache, PassesErrorsOnAndTriesAgain) {
    const auto storage = words();
    WordCache cache(storage, 512, 65536);
    storage->broken = true;
    EXPECT_TRUE(fails(cache.load({0}), Errc::io, {"words: broken"}));
    EXPECT_TRUE(fails(cache.load({0}), Errc::io));
    storage->broken = false;
    EXPECT_EQ(must(cache.load({0})), scrambled(0));
    storage->broken = true;
    EXPECT_EQ(must(cache.load({0})), scrambled(0)) << "what is cached needs no reading";
}

std::vector<std::uint64_t> load_all(WordCache& cache, HostOffset at, std::size_t count) {
    std::vector<std::uint64_t> words(count);
    for (std::size_t i = 0; i < count;) i += must(cache.load(at + i * 8, std::span(words).subspan(i)));
    return words;
}

std::vector<std::uint64_t> scrambled_words(HostOffset at, std::size_t count) {
    std::vector<std::uint64_t> words(count);
    for (std::size_t i = 0; i < count; ++i) words[i] = scrambled(at.value / 8 + i);
    return words;
}

TEST(WordCache, ReadsThePagesOfATableTogether) {
    const auto storage = words();
    WordCache cache(storage, 4096, 1 << 20);
    EXPECT_EQ(load_all(cache, {65536}, 8192), scrambled_words({65536}, 8192));
    EXPECT_EQ(storage->reads, 1);
    EXPECT_EQ(load_all(cache, {65536}, 8192), scrambled_words({65536}, 8192));
    EXPECT_EQ(storage->reads, 1);
    // Pages that are here are not read again at the ends of the run: this is about the 16 pages between two others.
    must(cache.load({4 * 65536}));
    must(cache.load({4 * 65536 + 17 * 4096}));
    EXPECT_EQ(load_all(cache, {4 * 65536}, 18 * 512), scrambled_words({4 * 65536}, 18 * 512));
    EXPECT_EQ(storage->reads, 4);
}

TEST(WordCache, ReadingPagesTogetherKeepsWhatWasStored) {
    const auto storage = words();
    // With so little room that pages of a table replace each other.
    for (const std::size_t sets : {1, 2, 4, 64}) {
        WordCache cache(storage, 4096, sets * 8 * 4096);
        const std::uint64_t stored = 7;
        ASSERT_TRUE(must(cache.store({65536 + 3 * 4096}, {&stored, 1}, 1)));
        auto expected = scrambled_words({65536}, 8192);
        expected[std::size_t{3} * 512] = stored;
        for (int round = 0; round < 3; ++round) EXPECT_EQ(load_all(cache, {65536}, 8192), expected) << sets;
    }
}

TEST(WordCache, APageCanBeReadThoughTheNextOneCannot) {
    const auto storage = words();
    storage->broken_from = 2 * 4096;
    WordCache cache(storage, 4096, 1 << 20);
    std::vector<std::uint64_t> to(8192);
    EXPECT_EQ(must(cache.load({0}, to)), 512U);
    EXPECT_EQ(to[511], scrambled(511));
    EXPECT_EQ(must(cache.load({4096}, to)), 512U);
    EXPECT_TRUE(fails(cache.load({8192}, to), Errc::io));
}

TEST(WordCache, ThreadsThatMissTheSamePageReadItOnce) {
    const auto storage = words();
    WordCache cache(storage, 4096, 65536);
    constexpr int rounds = 200;
    std::barrier<> together(4);
    {
        std::vector<std::jthread> threads;
        for (int i = 0; i < 4; ++i)
            threads.emplace_back([&] {
                for (std::uint64_t round = 0; round < rounds; ++round) {
                    together.arrive_and_wait();
                    EXPECT_EQ(must(cache.load({round * 4096})), scrambled(round * 512));
                }
            });
    }
    EXPECT_EQ(storage->reads, rounds);
}

class WordCacheUnderLoad : public testing::TestWithParam<std::size_t> {
protected:
    /// Four threads load from random places, `budget_pages` of `pages` being cached, and look at every word.
    static void load_at_random(std::size_t page_bytes, std::size_t budget_pages, std::uint64_t pages) {
        const auto storage = words(pages * page_bytes);
        WordCache cache(storage, page_bytes, budget_pages * page_bytes);
        std::atomic<int> wrong = 0;
        {
            std::vector<std::jthread> threads;
            for (std::uint64_t thread = 0; thread < 4; ++thread)
                threads.emplace_back([&, thread] {
                    std::vector<std::uint64_t> to(page_bytes / 8);
                    for (std::uint64_t i = 0; i < 20000; ++i) {
                        const auto word = scrambled(thread << 32 | i) % (pages * page_bytes / 8);
                        const auto count = must(cache.load({word * 8}, to));
                        for (std::size_t n = 0; n < count; ++n) wrong += to[n] == scrambled(word + n) ? 0 : 1;
                    }
                });
        }
        EXPECT_EQ(wrong, 0);
    }
};

TEST_P(WordCacheUnderLoad, GivesTheRightWordsWhilePagesComeAndGo) { load_at_random(GetParam(), 8, 10); }

TEST_P(WordCacheUnderLoad, GivesTheRightWordsWhereAllPagesFit) { load_at_random(GetParam(), 1024, 64); }

INSTANTIATE_TEST_SUITE_P(PagesOf, WordCacheUnderLoad, testing::Values(512, 4096), testing::PrintToStringParamName());

/// Writing a changed page later must not fail for want of space.
TEST(WordCacheTest, APageHasSpaceInTheFileBeforeItChanges) {
    const auto storage = words();
    WordCache cache(storage, 4096, 1 << 20);
    const std::uint64_t word = 7;
    storage->full = true;
    const auto refused = cache.store({8192 + 16}, {&word, 1}, 1);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, Errc::no_space);
    EXPECT_EQ(must(cache.load({8192 + 16})), scrambled((8192 + 16) / 8));
    EXPECT_EQ(cache.changed_count(1), 0U);
    EXPECT_FALSE(cache.reserve_space({8192}, 8));

    storage->full = false;
    must(cache.reserve_space({8192 + 64}, 8));
    storage->full = true;
    EXPECT_TRUE(must(cache.store({8192 + 16}, {&word, 1}, 1)));
    EXPECT_TRUE(must(cache.store({8192 + 24}, {&word, 1}, 1)));
    EXPECT_EQ(storage->spaces, (std::vector<std::pair<std::uint64_t, std::uint64_t>>{{8192, 4096}}));
}

TEST(WordCacheTest, ARangeGetsSpaceInOneCall) {
    const auto storage = words();
    WordCache cache(storage, 4096, 1 << 20);
    must(cache.reserve_space({65536}, 65536));
    EXPECT_EQ(storage->reads, 1);
    storage->full = true;
    const std::uint64_t word = 7;
    for (std::uint64_t page = 0; page < 16; ++page)
        EXPECT_TRUE(must(cache.store({65536 + page * 4096}, {&word, 1}, 1)));
    must(cache.reserve_space({65536 + 8}, 65536 - 16));
    EXPECT_FALSE(cache.reserve_space({65536}, 65536 + 8)) << "the page behind them has none";
    EXPECT_EQ(storage->spaces, (std::vector<std::pair<std::uint64_t, std::uint64_t>>{{65536, 65536}}));
}

}  // namespace
}  // namespace qcow
