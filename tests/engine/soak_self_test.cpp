// The suites with many threads, on a small format whose mistakes are known.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/soak.h"
#include "engine/toy_image.h"

namespace qcow::test {
namespace {

using testing::HasSubstr;
using testing::Optional;

const Mix mix{.write = 10, .zero = 1, .discard = 4, .flush = 2, .read = 5, .longest = 20};

SoakReport soak_toy(Mistake mistake) {
    auto random = Random::named("soak");
    const auto memory = memory_storage();
    ToyImage::create(*memory);
    ToyImage image(std::make_shared<NoisyStorage>(memory), mistake);
    return soak(image, mix, true, 8, std::chrono::seconds(1), random);
}

std::optional<std::string> overtake_toy(Mistake mistake, HeldStorage::Operation operation) {
    const auto memory = memory_storage();
    ToyImage::create(*memory);
    const auto held = std::make_shared<HeldStorage>(memory);
    ToyImage image(held, mistake);
    if (auto wrote = image.write({0}, stamped(0, ToyImage::block / sector_bytes, 1'000'000'001)); !wrote)
        return "cannot be written";
    return overtake(image, *held, operation, true);
}

TEST(SoakSelfTest, ASoundFormatSurvives) {
    const auto report = soak_toy(Mistake::none);
    EXPECT_FALSE(report.violation) << *report.violation;
}

TEST(SoakSelfTest, ALostUpdateIsFound) {
    EXPECT_THAT(soak_toy(Mistake::lost_update).violation, Optional(HasSubstr("not one of")));
}

TEST(OvertakeSelfTest, ASoundFormatSurvives) {
    for (const auto operation : {HeldStorage::Operation::read, HeldStorage::Operation::write}) {
        const auto violation = overtake_toy(Mistake::none, operation);
        EXPECT_FALSE(violation) << *violation;
    }
}

TEST(OvertakeSelfTest, ReuseOfWhatIsStillReadIsFound) {
    const auto violation = overtake_toy(Mistake::reuse_while_in_use, HeldStorage::Operation::read);
    EXPECT_THAT(violation, Optional(HasSubstr("sector 0 holds what was never written there")));
}

TEST(OvertakeSelfTest, ReuseOfWhatIsStillWrittenIsFound) {
    const auto violation = overtake_toy(Mistake::reuse_while_in_use, HeldStorage::Operation::write);
    EXPECT_THAT(violation, Optional(HasSubstr("holds what was never written there")));
}

}  // namespace
}  // namespace qcow::test
