#include "base/group_commit.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <latch>
#include <thread>
#include <vector>

#include "base/try.h"
#include "support/result.h"

namespace qcow {
namespace {

using test::must;

TEST(GroupCommit, EachCallThatIsAloneRuns) {
    GroupCommit group(2);
    int runs = 0;
    for (int i = 0; i < 3; ++i) {
        must(group.run([&]() -> Result<void> {
            ++runs;
            return {};
        }));
    }
    EXPECT_EQ(runs, 3);
}

TEST(GroupCommit, GivesTheResult) {
    GroupCommit group(1);
    const auto failed = group.run([]() -> Result<void> { return fail(Errc::io, "disk", "gone"); });
    ASSERT_FALSE(failed);
    EXPECT_EQ(failed.error().what, "gone");
    must(group.run([]() -> Result<void> { return {}; }));
}

TEST(GroupCommit, AsManyOverlapAsItAllows) {
    GroupCommit group(3);
    std::latch all_run(3);
    std::vector<std::jthread> threads;
    for (int i = 0; i < 3; ++i) {
        threads.emplace_back([&] {
            // One after the other they would never end.
            must(group.run([&]() -> Result<void> {
                all_run.arrive_and_wait();
                return {};
            }));
        });
    }
}

/// How many runs there are if eight call while one runs, given this long to call before that one ends.
int runs_of_nine(std::chrono::milliseconds head_start) {
    GroupCommit group(1);
    std::atomic<int> begun = 0;
    std::latch first_runs(1);
    std::latch may_end(1);
    std::vector<std::jthread> threads;
    threads.emplace_back([&] {
        must(group.run([&]() -> Result<void> {
            ++begun;
            first_runs.count_down();
            may_end.wait();
            return {};
        }));
    });
    first_runs.wait();
    std::atomic<int> ended = 0;
    for (int i = 0; i < 8; ++i) {
        threads.emplace_back([&] {
            must(group.run([&]() -> Result<void> {
                ++begun;
                return {};
            }));
            EXPECT_GE(begun, 2);  // the first began before this call
            ++ended;
        });
    }
    std::this_thread::sleep_for(head_start);
    EXPECT_EQ(begun, 1);
    EXPECT_EQ(ended, 0);
    may_end.count_down();
    threads.clear();
    EXPECT_EQ(ended, 8);
    return begun;
}

TEST(GroupCommit, TheOthersShareOneThatBeginsLater) {
    using std::chrono::milliseconds;
    // A busy machine may need longer.
    EXPECT_TRUE(runs_of_nine(milliseconds(20)) == 2 || runs_of_nine(milliseconds(200)) == 2 ||
                runs_of_nine(milliseconds(2000)) == 2);
}

TEST(GroupCommit, ACallIsNotAnsweredByARunThatBeganBefore) {
    GroupCommit group(2);
    std::latch first_runs(1);
    std::latch may_end(1);
    std::jthread first([&] {
        must(group.run([&]() -> Result<void> {
            first_runs.count_down();
            may_end.wait();
            return {};
        }));
    });
    first_runs.wait();
    bool ran = false;
    must(group.run([&]() -> Result<void> {
        ran = true;
        return {};
    }));
    EXPECT_TRUE(ran);
    may_end.count_down();
}

}  // namespace
}  // namespace qcow
