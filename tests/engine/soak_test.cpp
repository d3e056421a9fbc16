// Many threads on one qcow2 image.

#include <gtest/gtest.h>

#include "engine/image_kinds.h"
#include "engine/soak.h"
#include "support/effort.h"

namespace qcow::test {
namespace {

/// Kinds in which threads meet on tables, places and refcounts in different ways.
std::vector<ImageKind> soaked_kinds() {
    std::vector<ImageKind> result;
    for (auto& kind : image_kinds()) {
        for (const auto* name :
             {"v3_512", "v3_64k", "v2_4k", "extended_16k", "extended_snapshot", "data_file", "over_raw_longer_v3",
              "over_qcow2_shorter_v2", "compressed_4k", "compressed_snapshot", "snapshot_64k_v2", "lazy",
              "encrypted_snapshot", "detect_zeroes_unmap", "refcounts_1"}) {
            if (kind.name == name) result.push_back(kind);
        }
    }
    return result;
}

void expect_clean(const ImageKind& kind, const Files& files, const Kept& kept) {
    const auto image = value_of(open_kind(kind, files, false));
    const auto report = value_of(image->check({}));
    EXPECT_EQ(report.corruptions + report.errors, 0U) << (report.findings.empty() ? "" : report.findings[0].what);
    EXPECT_EQ(report.leaks, 0U);
    const auto harm = kept.harm(*image, files, 0);
    EXPECT_FALSE(harm) << *harm;
}

class SoakTest : public testing::TestWithParam<ImageKind> {};

TEST_P(SoakTest, EveryReadGivesWhatItMay) {
    for (const std::size_t cache_bytes : {std::size_t{1}, std::size_t{32} << 20}) {
        auto kind = GetParam();
        kind.open.cache_bytes = cache_bytes;
        auto random = Random::named(kind.name);
        const auto prepared = prepare(kind, random);
        const auto& files = prepared.files;
        Files noisy;
        for (const auto& [name, storage] : files) noisy[name] = std::make_shared<NoisyStorage>(storage);
        const auto image = value_of(open_kind(kind, noisy, true));
        const Mix mix{.write = 10,
                      .write_compressed = kind.can_compress() ? 1U : 0U,
                      .zero = 3,
                      .discard = 4,
                      .flush = 1,
                      .read = 8,
                      .longest = 3 * kind.create.cluster_size / sector_bytes};
        const auto report =
            soak(*image, mix, kind.discards_read_as_zeros(), 8, std::chrono::seconds(1) * effort(), random);
        ASSERT_FALSE(report.violation) << *report.violation << "\n" << replay_hint();
        EXPECT_GT(report.requests, 100U);
        value_of(image->close());
        expect_clean(kind, files, prepared.kept);
        std::cout << "covered " << report.requests << " requests of eight threads\n";
    }
}

INSTANTIATE_TEST_SUITE_P(Kinds, SoakTest, testing::ValuesIn(soaked_kinds()),
                         [](const auto& test) { return test.param.name; });

class OvertakeTest : public testing::TestWithParam<const char*> {
protected:
    void expect_sound(HeldStorage::Operation operation) {
        ImageKind kind;
        for (auto& candidate : image_kinds()) {
            if (candidate.name == GetParam()) kind = candidate;
        }
        auto random = Random::named(kind.name);
        const auto prepared = prepare(kind, random);
        const auto& files = prepared.files;
        auto held_files = files;
        const auto& data = kind.create.data_file_name.empty() ? image_name : kind.create.data_file_name;
        const auto held = std::make_shared<HeldStorage>(files.at(data));
        held_files[data] = held;
        const auto image = value_of(open_kind(kind, held_files, true));
        if (operation == HeldStorage::Operation::read && kind.contents == ImageKind::Contents::none)
            value_of(image->write({0}, stamped(0, image->block_size() / sector_bytes, first_value)));
        const auto violation = overtake(*image, *held, operation, kind.discards_read_as_zeros());
        ASSERT_FALSE(violation) << *violation;
        value_of(image->close());
        expect_clean(kind, files, prepared.kept);
    }
};

TEST_P(OvertakeTest, WhatIsStillReadIsNotUsedAgain) { expect_sound(HeldStorage::Operation::read); }
TEST_P(OvertakeTest, WhatIsStillWrittenIsNotUsedAgain) { expect_sound(HeldStorage::Operation::write); }

INSTANTIATE_TEST_SUITE_P(Kinds, OvertakeTest,
                         testing::Values("v3_4k", "v3_64k", "v2_4k", "extended_16k", "data_file", "compressed_4k",
                                         "lazy"),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace qcow::test
