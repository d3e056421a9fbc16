#include "server/crew.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <latch>

#include "base/bits.h"
#include "server/pace.h"

namespace qcow {
namespace {

TEST(CrewTest, RunsEveryTaskOnceOnAtMostSoManyThreads) {
    std::mutex mutex;
    std::vector<std::thread::id> ids;
    {
        Crew crew(3, MiB);
        for (int i = 0; i < 200; ++i) {
            crew.reserve(0);
            crew.submit(0, [&] {
                const std::lock_guard lock(mutex);
                ids.push_back(std::this_thread::get_id());
            });
        }
    }
    EXPECT_EQ(ids.size(), 200U);
    std::ranges::sort(ids);
    ids.erase(std::ranges::unique(ids).begin(), ids.end());
    EXPECT_LE(ids.size(), 3U);
    EXPECT_EQ(std::ranges::count(ids, std::this_thread::get_id()), 0);
}

TEST(CrewTest, AThreadStartsForEachTaskThatWouldWait) {
    Crew crew(4, MiB);
    std::latch together(4);
    for (int i = 0; i < 4; ++i) {
        crew.reserve(0);
        crew.submit(0, [&] { together.arrive_and_wait(); });
    }
    crew.finish();
    EXPECT_TRUE(crew.is_idle());
    EXPECT_TRUE(crew.exists());
    EXPECT_FALSE(Crew(0, MiB).exists());
}

TEST(CrewTest, TasksHoldAtMostSoManyBytes) {
    Crew crew(8, MiB);
    std::atomic<std::uint64_t> held = 0;
    std::atomic<std::uint64_t> most = 0;
    for (int i = 0; i < 100; ++i) {
        crew.reserve(300 * KiB);
        const auto now = held += 300 * KiB;
        most = std::max<std::uint64_t>(most, now);
        crew.submit(300 * KiB, [&] {
            std::this_thread::sleep_for(std::chrono::microseconds(100));
            held -= 300 * KiB;
        });
    }
    crew.finish();
    EXPECT_EQ(held, 0U);
    EXPECT_LE(most, MiB);
    EXPECT_GT(most, 300 * KiB);
}

TEST(CrewTest, OneTaskMayHoldMoreThanAllTogether) {
    Crew crew(2, MiB);
    std::atomic<bool> done = false;
    crew.reserve(5 * MiB);
    crew.submit(5 * MiB, [&] { done = true; });
    crew.reserve(5 * MiB);  // not before the first has given it back
    EXPECT_TRUE(done);
    crew.submit(5 * MiB, [] {});
}

TEST(PaceTest, OneSlowRequestInEightTipsTheScales) {
    const auto slow_in = [](unsigned n) {
        Pace pace;
        for (unsigned i = 0; i < 30 * n && !pace.is_slow(); ++i) {
            pace.timed(0, [&] {
                if (i % n == 0) std::this_thread::sleep_for(std::chrono::microseconds(60));
                return true;
            });
        }
        return pace.is_slow();
    };
    EXPECT_TRUE(slow_in(1));
    EXPECT_TRUE(slow_in(4));
    EXPECT_FALSE(Pace().is_slow());
}

}  // namespace
}  // namespace qcow
