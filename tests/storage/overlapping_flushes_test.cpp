#include "storage/overlapping_flushes.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <latch>
#include <thread>

namespace qcow {
namespace {

void let_others_run() { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }

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
    let_others_run();
    EXPECT_FALSE(first_returned);  // it cannot know yet
    second_may_end.count_down();
}

TEST(OverlappingFlushes, AnErrorOfTheLaterToEndIsBoths) { expect_both_told(0, EIO); }
TEST(OverlappingFlushes, AnErrorOfTheEarlierToEndIsBoths) { expect_both_told(EIO, 0); }

TEST(OverlappingFlushes, WhatBeganAfterItEndedIsNotWaitedFor) {
    OverlappingFlushes flushes;
    std::latch both(2);
    std::latch second_may_end(1);
    std::latch third_runs(1);
    std::latch third_may_end(1);
    std::jthread first([&] {
        EXPECT_EQ(flushes.run([&] {
            both.arrive_and_wait();
            return 0;
        }),
                  0);
    });
    std::jthread second([&] {
        EXPECT_EQ(flushes.run([&] {
            both.arrive_and_wait();
            second_may_end.wait();
            return 0;
        }),
                  0);
    });
    both.wait();
    let_others_run();  // the first waits for the second now
    std::jthread third([&] {
        EXPECT_EQ(flushes.run([&] {
            third_runs.count_down();
            third_may_end.wait();
            return 0;
        }),
                  0);
    });
    third_runs.wait();
    second_may_end.count_down();
    first.join();
    third_may_end.count_down();
}

}  // namespace
}  // namespace qcow
