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

TEST(RequestGateTest, NobodyPassesAClosedGate) {
    RequestGate gate;
    std::atomic<std::uint64_t> inside = 0;
    std::atomic<bool> ends = false;
    std::vector<std::jthread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] {
            while (!ends) {
                const RequestGate::Pass pass(gate);
                ++inside;
                --inside;
            }
        });
    }
    for (int round = 0; round < 200; ++round) {
        ASSERT_TRUE(gate.close(10s));
        EXPECT_EQ(inside, 0U);
        gate.open();
    }
    ends = true;
}

}  // namespace
}  // namespace qcow
