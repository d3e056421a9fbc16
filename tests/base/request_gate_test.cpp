#include "base/request_gate.h"

#include <gtest/gtest.h>

#include <atomic>
#include <optional>
#include <thread>
#include <vector>

namespace qcow {
namespace {

using namespace std::chrono_literals;

TEST(RequestGateTest, ClosingWaitsForRequestsThatRun) {
    RequestGate gate;
    std::optional<RequestGate::Pass> running(std::in_place, gate);
    EXPECT_FALSE(gate.close(10ms)) << "one still runs";
    {
        const RequestGate::Pass another(gate);
    }  // it is open again
    running.reset();
    EXPECT_TRUE(gate.close(10ms));
    gate.open();
}

TEST(RequestGateTest, RequestsThatWaitGoOnWhenClosingGivesUp) {
    RequestGate gate;
    const RequestGate::Pass running(gate);
    std::atomic<bool> passed = false;
    std::jthread waiting([&] {
        std::this_thread::sleep_for(5ms);  // the gate is closed then
        const RequestGate::Pass pass(gate);
        passed = true;
    });
    EXPECT_FALSE(gate.close(30ms));
    waiting.join();
    EXPECT_TRUE(passed);
}

TEST(RequestGateTest, ClosingReturnsAsSoonAsTheLastRequestIsDone) {
    RequestGate gate;
    std::optional<RequestGate::Pass> running(std::in_place, gate);
    const std::jthread ends([&] {
        std::this_thread::sleep_for(5ms);
        running.reset();
    });
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_TRUE(gate.close(1min));
    EXPECT_LT(std::chrono::steady_clock::now() - begin, 30s);
    gate.open();
}

TEST(RequestGateTest, NobodyPassesAClosedGate) {
    RequestGate gate;
    std::atomic<std::uint64_t> inside = 0;
    std::atomic<std::uint64_t> passes = 0;
    std::atomic<bool> ends = false;
    std::vector<std::jthread> threads;
    for (int i = 0; i < 2; ++i) {
        threads.emplace_back([&] {
            while (!ends) {
                const RequestGate::Pass pass(gate);
                ++inside;
                ++passes;
                --inside;
            }
        });
    }
    for (int round = 0; round < 10; ++round) {
        ASSERT_TRUE(gate.close(10s));
        EXPECT_EQ(inside, 0U);
        const auto before = passes.load();
        gate.open();
        while (passes == before) std::this_thread::yield();
    }
    ends = true;
}

}  // namespace
}  // namespace qcow
