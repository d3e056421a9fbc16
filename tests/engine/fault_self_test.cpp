// The search for faults that do harm, on a small format whose mistakes are known.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/faulty_run.h"
#include "engine/toy_image.h"

namespace qcow::test {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

void fail_each_of_toy(Mistake mistake, Faults::Operation operation) {
    auto random = Random::named("faults");
    Files files{{image_name, memory_storage({}, image_name)}};
    ToyImage::create(*files[image_name]);
    const Opener open = [&](const Files& opened, bool) -> Result<std::shared_ptr<Image>> {
        try {
            return std::make_shared<ToyImage>(opened.at(image_name), mistake);
        } catch (const std::exception& e) {
            return std::unexpected(Error{Errc::io, "toy", e.what()});
        }
    };
    const FaultyRun::Setting setting{
        .open = open, .files = files, .sectors = ToyImage::guest_blocks * ToyImage::block / sector_bytes};
    const Mix mix{.write = 10, .discard = 3, .flush = 3, .read = 3};
    fail_each(setting, operation, [&](FaultyRun& run) { run.work(mix, 40); }, 60, random);
}

TEST(FaultSelfTest, ASoundFormatSurvives) {
    for (const auto operation : {Faults::Operation::read, Faults::Operation::write, Faults::Operation::flush})
        EXPECT_NO_THROW(fail_each_of_toy(Mistake::none, operation));
}

TEST(FaultSelfTest, AnErrorThatNobodyIsToldIsFound) {
    EXPECT_THROW(fail_each_of_toy(Mistake::error_swallowed, Faults::Operation::flush), std::runtime_error);
}

TEST(FaultSelfTest, AFlushThatSucceedsAfterOneThatFailedIsFound) {
    EXPECT_THAT([] { fail_each_of_toy(Mistake::flush_tried_again, Faults::Operation::flush); },
                ThrowsMessage<std::runtime_error>(HasSubstr("power loss")));
}

}  // namespace
}  // namespace qcow::test
