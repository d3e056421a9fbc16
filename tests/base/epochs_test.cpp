#include "base/epochs.h"

#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <thread>
#include <vector>

namespace qcow {
namespace {

TEST(EpochsTest, WithoutRequestsTwoEpochsPassAtOnce) {
    Epochs epochs;
    const auto removed = epochs.now();
    EXPECT_FALSE(epochs.passed(removed));
    EXPECT_TRUE(epochs.advance());
    EXPECT_FALSE(epochs.passed(removed)) << "one epoch is not enough";
    EXPECT_TRUE(epochs.advance());
    EXPECT_TRUE(epochs.passed(removed));
    EXPECT_FALSE(epochs.passed(epochs.now()));
}

/// Of both parities: the counters of epochs take turns.
TEST(EpochsTest, ARequestThatBeganBeforeIsWaitedFor) {
    Epochs epochs;
    for (int round = 0; round < 4; ++round) {
        std::optional<Epochs::Guard> request(std::in_place, epochs);
        const auto removed = epochs.now();
        EXPECT_TRUE(epochs.advance()) << "nobody is left of the epoch before";
        for (int again = 0; again < 3; ++again) EXPECT_FALSE(epochs.advance());
        EXPECT_FALSE(epochs.passed(removed));
        request.reset();
        EXPECT_TRUE(epochs.advance());
        EXPECT_TRUE(epochs.passed(removed));
        EXPECT_TRUE(epochs.advance());  // the next round begins at the other parity
    }
}

TEST(EpochsTest, ARequestOfALaterEpochIsNotWaitedFor) {
    Epochs epochs;
    const auto removed = epochs.now();
    EXPECT_TRUE(epochs.advance());
    const Epochs::Guard later(epochs);
    EXPECT_TRUE(epochs.advance());
    EXPECT_TRUE(epochs.passed(removed));
    EXPECT_FALSE(epochs.advance()) << "what is removed now is waited for";
}

TEST(EpochsTest, EachRequestIsCounted) {
    Epochs epochs;
    std::optional<Epochs::Guard> first(std::in_place, epochs);
    std::optional<Epochs::Guard> second(std::in_place, epochs);
    EXPECT_TRUE(epochs.advance());
    first.reset();
    EXPECT_FALSE(epochs.advance());
    second.reset();
    EXPECT_TRUE(epochs.advance());
}

/// More threads than there are stripes. Each request ends on another thread than it began on.
TEST(EpochsTest, RequestsOfAllThreadsAreCounted) {
    Epochs epochs;
    std::vector<std::unique_ptr<Epochs::Guard>> requests(stripe_count + 3);
    for (auto& request : requests) std::thread([&] { request = std::make_unique<Epochs::Guard>(epochs); }).join();
    EXPECT_TRUE(epochs.advance());
    for (auto& request : requests) {
        EXPECT_FALSE(epochs.advance());
        request.reset();
    }
    EXPECT_TRUE(epochs.advance());
}

/// The use that it is made for: what readers find is marked as torn down only after all that may have it are done.
TEST(EpochsTest, NobodyHasWhatIsTornDown) {
    Epochs epochs;
    struct Thing {
        std::atomic<bool> torn_down = false;
    };
    std::vector<Thing> things(300);
    std::atomic<Thing*> visible = things.data();
    std::atomic<bool> ends = false;
    std::atomic<unsigned> seen_too_late = 0;
    std::vector<std::jthread> readers;
    for (int i = 0; i < 3; ++i) {
        readers.emplace_back([&] {
            while (!ends) {
                const Epochs::Guard request(epochs);
                const Thing* const thing = visible.load();
                for (int look = 0; look < 20; ++look) seen_too_late += thing->torn_down.load() ? 1 : 0;
            }
        });
    }
    for (std::size_t next = 1; next < things.size(); ++next) {
        Thing* const old = visible.exchange(&things[next]);
        const auto removed = epochs.now();
        while (!epochs.passed(removed)) {
            if (!epochs.advance()) std::this_thread::yield();
        }
        old->torn_down = true;
    }
    ends = true;
    readers.clear();
    EXPECT_EQ(seen_too_late, 0U);
}

}  // namespace
}  // namespace qcow
