#include "storage/overlapping_flushes.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <functional>
#include <future>
#include <latch>
#include <thread>

namespace qcow {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

TEST(OverlappingFlushes, OneByItselfGivesWhatTheSystemSays) {
    OverlappingFlushes flushes;
    EXPECT_EQ(flushes.run([] { return 0; }), 0);
    EXPECT_EQ(flushes.run([] { return EIO; }), EIO);
}

TEST(OverlappingFlushes, AfterOneThatFailedNoneSucceeds) {
    OverlappingFlushes flushes;
    EXPECT_EQ(flushes.run([] { return ENOSPC; }), ENOSPC);
    int calls = 0;
    EXPECT_EQ(flushes.run([&] {
        ++calls;
        return 0;
    }),
              ENOSPC);
    EXPECT_EQ(calls, 0);
}

TEST(OverlappingFlushes, TheyDoOverlap) {
    OverlappingFlushes flushes;
    std::latch both(2);
    const auto meet = [&] {
        both.arrive_and_wait();
        return 0;
    };
    std::jthread other([&] { EXPECT_EQ(flushes.run(meet), 0); });
    EXPECT_EQ(flushes.run(meet), 0);
}

/// Two overlap, and the system says of the error to the one alone or to the other alone.
void expect_both_told(int said_to_first, int said_to_second) {
    OverlappingFlushes flushes;
    std::latch both(2);
    std::atomic<bool> first_returned = false;
    std::latch second_may_end(1);
    std::jthread first([&] {
        EXPECT_EQ(flushes.run([&] {
            both.arrive_and_wait();
            return said_to_first;
        }),
                  EIO);
        first_returned = true;
    });
    std::jthread second([&] {
        EXPECT_EQ(flushes.run([&] {
            both.arrive_and_wait();
            second_may_end.wait();
            return said_to_second;
        }),
                  EIO);
    });
    both.wait();
    std::this_thread::sleep_for(milliseconds(20));
    EXPECT_FALSE(first_returned);  // it cannot know yet
    second_may_end.count_down();
}

TEST(OverlappingFlushes, AnErrorOfTheLaterToEndIsBoths) { expect_both_told(0, EIO); }
TEST(OverlappingFlushes, AnErrorOfTheEarlierToEndIsBoths) { expect_both_told(EIO, 0); }

/// A flush ends, and waits for one that it overlapped; a third begins, and does not end. Whether the first returns all
/// the same, given this long to end before the third begins.
bool returns_before_the_third(milliseconds head_start) {
    OverlappingFlushes flushes;
    const auto flush = [&](const std::function<void()>& meanwhile) {
        EXPECT_EQ(flushes.run([&] {
            meanwhile();
            return 0;
        }),
                  0);
    };
    std::latch both(2);
    std::latch second_may_end(1);
    std::latch third_runs(1);
    std::latch third_may_end(1);
    std::promise<void> returned;
    std::jthread first([&] {
        flush([&] { both.arrive_and_wait(); });
        returned.set_value();
    });
    std::jthread second([&] {
        flush([&] {
            both.arrive_and_wait();
            second_may_end.wait();
        });
    });
    both.wait();
    std::this_thread::sleep_for(head_start);
    std::jthread third([&] {
        flush([&] {
            third_runs.count_down();
            third_may_end.wait();
        });
    });
    third_runs.wait();
    second_may_end.count_down();
    const bool in_time = returned.get_future().wait_for(seconds(2)) == std::future_status::ready;
    third_may_end.count_down();
    return in_time;
}

TEST(OverlappingFlushes, WhatBeganAfterItEndedIsNotWaitedFor) {
    // A busy machine may need longer.
    EXPECT_TRUE(returns_before_the_third(milliseconds(20)) || returns_before_the_third(milliseconds(200)) ||
                returns_before_the_third(seconds(2)));
}

}  // namespace
}  // namespace qcow
