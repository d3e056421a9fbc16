#include "server/polling.h"

#include <gtest/gtest.h>

namespace qcow::test {
namespace {

using std::chrono::microseconds;

TEST(PollingTest, PaysWhileWorkComesSoon) {
    Polling polling(microseconds(50));
    EXPECT_TRUE(polling.pays());
    polling.came_after(microseconds(5));
    EXPECT_TRUE(polling.pays());
    polling.came_after(microseconds(1000));
    EXPECT_FALSE(polling.pays());
    // The thread has slept, and came late.
    polling.came_after(microseconds(120));
    EXPECT_TRUE(polling.pays());
}

TEST(PollingTest, NeverPaysWithoutALimit) {
    Polling polling(microseconds(0));
    EXPECT_FALSE(polling.pays());
    polling.came_after(microseconds(1));
    EXPECT_FALSE(polling.pays());
}

}  // namespace
}  // namespace qcow::test
