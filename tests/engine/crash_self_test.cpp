// The search for what power losses break, itself put to the test: on a disk without structure, and on a small format
// whose mistakes are known.

#include <gtest/gtest.h>

#include "engine/crash_explorer.h"
#include "engine/toy_image.h"

namespace qcow::test {
namespace {

/// Random work on an image, and then every power loss.
CrashReport explore_toy(Mistake mistake, unsigned states, Random random) {
    const Opener open = [&](const Files& files, bool writable) -> Result<std::shared_ptr<Image>> {
        return std::make_shared<ToyImage>(files.at(image_name), writable ? mistake : Mistake::none);
    };
    Files files{{image_name, memory_storage({}, image_name)}};
    ToyImage::create(*files[image_name]);
    const auto before = copy_of(files);

    StorageLog log;
    SectorModel model(ToyImage::guest_blocks * ToyImage::block / sector_bytes);
    const auto recorded = std::make_shared<RecordingStorage>(files[image_name], image_name, log);
    ToyImage image(recorded, mistake);
    Guest guest(image, model, [&] { return log.mark(); }, true);
    for (int i = 0; i < 150; ++i) {
        const auto first = random.below(120);
        const auto count = random.between(1, 20);
        switch (random.below(6)) {
            case 0: value_of(guest.discard(first, 4 * count)); break;
            case 1: value_of(guest.flush()); break;
            default: value_of(guest.write(first, count));
        }
    }
    return CrashExplorer({log, before, model}, open, random).explore({.samples = states});
}

TEST(CrashSelfTest, ASoundFormatSurvives) {
    const auto report = explore_toy(Mistake::none, 1500, Random::named("toy"));
    EXPECT_GE(report.states, 1500U);
    EXPECT_FALSE(report.violation) << *report.violation << "\n" << replay_hint();
}

class CrashMistakeTest : public testing::TestWithParam<Mistake> {};

TEST_P(CrashMistakeTest, IsFound) {
    // Always the same work: whether a mistake is found must not be luck.
    const auto report = explore_toy(GetParam(), 1500, Random(1));
    ASSERT_TRUE(report.violation);
    std::cout << "after " << report.states << " states: " << *report.violation << "\n";
}

INSTANTIATE_TEST_SUITE_P(All, CrashMistakeTest,
                         testing::Values(Mistake::flush_skipped, Mistake::mapping_first, Mistake::data_last,
                                         Mistake::reuse_before_commit, Mistake::punch_before_commit),
                         [](const auto& test) { return mistake_name(test.param); });

/// A disk without structure keeps its promises if its flushes do; and loses what was flushed if one is left out.
TEST(CrashSelfTest, ARawDiskWithoutOneOfItsFlushesIsFound) {
    auto random = Random::named("raw");
    constexpr std::uint64_t sectors = 256;
    const Opener open = [](const Files& files, bool writable) {
        return open_image(files.at(image_name), {.writable = writable, .format = Format::raw});
    };
    const Files files{{image_name, memory_storage(Bytes(sectors * sector_bytes), image_name)}};
    const auto before = copy_of(files);
    StorageLog log;
    SectorModel model(sectors);
    const auto recorded = std::make_shared<RecordingStorage>(files.at(image_name), image_name, log);
    const auto image = value_of(open_image(recorded, {.writable = true, .format = Format::raw}));
    Guest guest(*image, model, [&] { return log.mark(); }, true);
    for (int i = 0; i < 60; ++i) {
        const auto first = random.below(200);
        if (i % 10 == 9) {
            value_of(guest.flush());
        } else if (i % 7 == 0) {
            value_of(guest.discard(first, 40));
        } else {
            value_of(guest.write(first, random.between(1, 40)));
        }
    }
    const CrashOptions options{.samples = 400};
    const auto sound = CrashExplorer({log, before, model}, open, random).explore(options);
    EXPECT_FALSE(sound.violation) << *sound.violation;
    const auto flushless = log.without_flushes([](std::size_t) { return true; });
    EXPECT_TRUE(CrashExplorer({flushless, before, model}, open, random).explore(options).violation);
}

}  // namespace
}  // namespace qcow::test
