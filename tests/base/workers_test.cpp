#include "base/workers.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <barrier>
#include <mutex>
#include <set>
#include <thread>

#include "base/try.h"
#include "support/result.h"

namespace qcow {
namespace {

using test::fails;
using test::must;

TEST(Workers, ThereIsAtLeastOneByDefault) { EXPECT_GE(default_workers(), 1U); }

TEST(Workers, EachIndexIsCalledOnce) {
    std::array<std::atomic<int>, 5> calls = {};
    must(run_workers(5, [&](unsigned index) -> Result<void> {
        ++calls.at(index);
        return {};
    }));
    for (const auto& count : calls) EXPECT_EQ(count, 1);
}

TEST(Workers, AllRunAtOnce) {
    // Each waits for all others: one after the other, they would never end.
    std::barrier<> meeting(4);
    must(run_workers(4, [&](unsigned) -> Result<void> {
        meeting.arrive_and_wait();
        return {};
    }));
}

TEST(Workers, EachHasAThreadOfItsOwnAndTheLastHasTheCallers) {
    std::mutex mutex;
    std::set<std::thread::id> threads;
    std::thread::id last;
    std::barrier<> meeting(3);
    must(run_workers(3, [&](unsigned index) -> Result<void> {
        meeting.arrive_and_wait();
        const std::lock_guard lock(mutex);
        threads.insert(std::this_thread::get_id());
        if (index == 2) last = std::this_thread::get_id();
        return {};
    }));
    EXPECT_EQ(threads.size(), 3U);
    EXPECT_EQ(last, std::this_thread::get_id());
}

TEST(Workers, ASingleOneNeedsNoThread) {
    must(run_workers(1, [caller = std::this_thread::get_id()](unsigned index) -> Result<void> {
        EXPECT_EQ(index, 0U);
        EXPECT_EQ(std::this_thread::get_id(), caller);
        return {};
    }));
}

TEST(Workers, TheErrorOfAnyOfThemIsGiven) {
    const auto result = run_workers(3, [](unsigned index) -> Result<void> {
        if (index == 1) return fail(Errc::no_space, "worker", "the disk is full");
        return {};
    });
    EXPECT_TRUE(fails(result, Errc::no_space, {"worker: the disk is full"}));
}

TEST(Workers, AnErrorDoesNotStopTheOthers) {
    std::atomic<bool> failed = false;
    std::atomic<bool> finished = false;
    const auto result = run_workers(2, [&](unsigned index) -> Result<void> {
        if (index == 0) {
            failed = true;
            return fail(Errc::io, "", "broken");
        }
        while (!failed) std::this_thread::yield();
        finished = true;
        return {};
    });
    EXPECT_TRUE(fails(result, Errc::io, {"broken"}));
    EXPECT_TRUE(finished);
}

TEST(Workers, OfSeveralErrorsOneIsGiven) {
    const auto result = run_workers(4, [](unsigned) -> Result<void> { return fail(Errc::corrupt, "", "damaged"); });
    EXPECT_TRUE(fails(result, Errc::corrupt, {"damaged"}));
}

}  // namespace
}  // namespace qcow
