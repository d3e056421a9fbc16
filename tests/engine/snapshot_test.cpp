// Internal snapshots of a disk that is in use.

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <thread>

#include "base/bits.h"
#include "base/endian.h"
#include "engine/bitmapped_image.h"
#include "engine/works.h"
#include "support/bytes.h"
#include "support/disks.h"
#include "support/effort.h"
#include "support/faulty.h"

namespace qcow::test {
namespace {

std::shared_ptr<Image> new_image(const CreateOptions& create, const std::shared_ptr<Storage>& storage) {
    value_of(create_image({storage, nullptr}, create));
    return value_of(open_image(storage, {.writable = true, .format = Format::qcow2}));
}

std::uint64_t number_at(Disk& disk, std::uint64_t at) {
    std::array<std::byte, sector_bytes> sector;
    value_of(disk.read({at}, sector));
    return load_be<std::uint64_t>(sector, 0);
}

void expect_clean(Image& image) {
    const auto report = value_of(image.check({}));
    EXPECT_EQ(report.corruptions + report.errors + report.leaks, 0U)
        << (report.findings.empty() ? "" : report.findings.front().what);
}

class LiveSnapshotTest : public testing::TestWithParam<CreateOptions> {};

/// Each thread counts at one place and then at another. A point in time has both, the first ahead by one at most; what
/// was counted before the call, and nothing that began after it.
TEST_P(LiveSnapshotTest, ItIsOnePointInTime) {
    constexpr unsigned writers = 7;
    const auto storage = memory_storage();
    const auto image = new_image(GetParam(), storage);
    const std::uint64_t half = image->size() / 2;
    std::array<std::atomic<std::uint64_t>, writers> begun = {};
    std::array<std::atomic<std::uint64_t>, writers> done = {};
    std::atomic<bool> over = false;
    const auto place = [&](unsigned writer) { return align_down(half / writers * writer, sector_bytes); };
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < writers; ++t) {
        threads.emplace_back([&, t] {
            Random random(t);
            std::array<std::byte, sector_bytes> sector = {};
            for (std::uint64_t n = 1; !over; ++n) {
                store_be(sector, 0, n);
                begun[t] = n;
                value_of(image->write({place(t)}, sector));
                value_of(image->write({half + place(t)}, sector));
                done[t] = n;
                const std::uint64_t at = place(t) + sector_bytes * random.between(1, half / writers / sector_bytes - 2);
                value_of(random.chance(20) ? image->write_zeroes({at}, sector_bytes) : image->write({at}, sector));
                if (random.chance(5)) value_of(image->flush());
            }
        });
    }
    struct Seen {
        std::string name;
        std::shared_ptr<Disk> disk;
        Bytes contents;
    };
    std::vector<Seen> seen;
    Random random(run_seed());
    for (unsigned round = 0; round < rounds(30); ++round) {
        std::array<std::uint64_t, writers> least = {};
        for (unsigned t = 0; t < writers; ++t) least[t] = done[t];
        const auto name = fmt::format("s{}", round);
        value_of(image->snapshots().create(name));
        std::array<std::uint64_t, writers> most = {};
        for (unsigned t = 0; t < writers; ++t) most[t] = begun[t];
        const auto disk = value_of(image->snapshots().open(name));
        for (unsigned t = 0; t < writers; ++t) {
            const auto first = number_at(*disk, place(t));
            const auto second = number_at(*disk, half + place(t));
            EXPECT_LE(least[t], second);
            EXPECT_LE(second, first);
            EXPECT_LE(first, second + 1);
            EXPECT_LE(first, most[t]);
        }
        Bytes contents(disk->size());
        value_of(disk->read({0}, contents));
        seen.push_back({name, disk, std::move(contents)});
        if (seen.size() < 4) continue;
        const auto chosen = seen.begin() + static_cast<std::ptrdiff_t>(random.below(seen.size()));
        Bytes now(chosen->disk->size());
        value_of(chosen->disk->read({0}, now));
        EXPECT_TRUE(now == chosen->contents) << chosen->name;
        value_of(image->snapshots().remove(chosen->name));
        const auto gone = chosen->disk->read({0}, now);
        EXPECT_TRUE(!gone && gone.error().code == Errc::not_found);
        seen.erase(chosen);
    }
    over = true;
    for (auto& thread : threads) thread.join();
    expect_clean(*image);
    for (const auto& snapshot : seen) {
        Bytes now(snapshot.disk->size());
        value_of(snapshot.disk->read({0}, now));
        EXPECT_TRUE(now == snapshot.contents) << snapshot.name;
        value_of(image->snapshots().remove(snapshot.name));
    }
    expect_clean(*image);
    value_of(image->close());
}

INSTANTIATE_TEST_SUITE_P(Kinds, LiveSnapshotTest,
                         testing::Values(CreateOptions{.size = 8 * MiB, .cluster_size = 4096},
                                         CreateOptions{.size = 8 * MiB},
                                         CreateOptions{.size = 4 * MiB, .version = 2, .cluster_size = 512},
                                         CreateOptions{.size = 8 * MiB, .cluster_size = 16384, .extended_l2 = true}),
                         [](const auto& test) {
                             return fmt::format("v{}_{}{}", test.param.version, test.param.cluster_size,
                                                test.param.extended_l2 ? "_extended" : "");
                         });

/// A refcount that cannot grow: the snapshot is refused, and nothing has changed.
TEST(SnapshotLimitTest, NarrowRefcountsRefuseIt) {
    for (const unsigned bits : {1U, 2U}) {
        const auto storage = memory_storage();
        const auto image = new_image({.size = 2 * MiB, .cluster_size = 4096, .refcount_bits = bits}, storage);
        value_of(image->write({0}, Bytes(1 * MiB, std::byte{7})));
        for (unsigned i = 1; i < bits + 1; ++i) {
            const auto made = image->snapshots().create("one");
            EXPECT_EQ(made.has_value(), bits == 2) << bits;
            if (bits == 2) value_of(image->snapshots().create("two"));
            const auto refused = image->snapshots().create("three");
            ASSERT_FALSE(refused);
            EXPECT_EQ(refused.error().code, Errc::limit_exceeded);
            EXPECT_NE(refused.error().what.find("refcount_bits"), std::string::npos);
            break;
        }
        expect_clean(*image);
        EXPECT_FALSE(value_of(image->info()).dirty);
        // What the failed one shared is written to again.
        value_of(image->write({4096}, Bytes(4096, std::byte{8})));
        expect_clean(*image);
        EXPECT_EQ(value_of(image->snapshots().list()).size(), bits == 1 ? 0U : 2U);
    }
}

TEST(SnapshotNameTest, WhatIsNotClearIsRefused) {
    const auto image = new_image({.size = 1 * MiB}, memory_storage());
    auto snapshots = image->snapshots();
    value_of(snapshots.create("2"));
    value_of(snapshots.create("other"));
    value_of(snapshots.create("twice"));
    value_of(snapshots.create("twice"));
    const auto refused = snapshots.remove("twice");
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, Errc::invalid_argument);
    value_of(snapshots.rename("1", "first"));
    value_of(snapshots.remove("2"));
    value_of(snapshots.remove("4"));
    const auto left = value_of(snapshots.list());
    ASSERT_EQ(left.size(), 2U);
    EXPECT_EQ(left[0].name, "first");
    EXPECT_EQ(left[1].id, "3");
    for (const auto& bad : {std::string(), std::string(256, 'x')})
        EXPECT_EQ(snapshots.create(bad).error().code, Errc::invalid_argument);
    EXPECT_EQ(snapshots.apply("none").error().code, Errc::not_found);
}

TEST(SnapshotSizeTest, ApplyingMakesTheDiskAsLarge) {
    const auto storage = memory_storage();
    const auto image = new_image({.size = 1 * MiB, .cluster_size = 512}, storage);
    value_of(image->write({0}, Bytes(1 * MiB, std::byte{1})));
    value_of(image->snapshots().create("small"));
    value_of(image->resize(40 * MiB));
    value_of(image->write({39 * MiB}, Bytes(1 * MiB, std::byte{2})));
    value_of(image->snapshots().create("large"));
    value_of(image->snapshots().apply("small"));
    EXPECT_EQ(image->size(), 1 * MiB);
    expect_clean(*image);
    value_of(image->snapshots().apply("large"));
    EXPECT_EQ(image->size(), 40 * MiB);
    Bytes bytes(1 * MiB);
    value_of(image->read({39 * MiB}, bytes));
    EXPECT_EQ(bytes, Bytes(1 * MiB, std::byte{2}));
    expect_clean(*image);
}

/// Whatever the disk becomes, an enabled bitmap covers the change; so it does where applying fails half-way.
TEST(SnapshotBitmapTest, ApplyingMarksTheWholeDisk) {
    for (const bool fails : {false, true}) {
        Random random(run_seed());
        auto files = prepare(small("v3_4k"), random).files;
        const BitmapSpec spec{"all", 4096};
        with_files(files, [&](const auto& directory) { add_bitmap(spec, directory); });
        const auto faults = std::make_shared<Faults>();
        Files faulty;
        for (const auto& [name, storage] : files) faulty[name] = std::make_shared<FaultyStorage>(storage, faults);
        const auto image = value_of(open_kind(small("v3_4k"), faulty, true));
        value_of(image->snapshots().create("small"));
        value_of(image->resize(2 * image->size()));
        value_of(image->snapshots().create("large"));
        value_of(image->snapshots().apply("small"));
        for (const bool dirty : bits_of(*image, spec)) ASSERT_TRUE(dirty);
        // The first read after the header has changed is of what is to be freed.
        if (fails) faults->arm({.operation = Faults::Operation::read, .after = 1});
        const auto applied = image->snapshots().apply("large");
        faults->disarm();
        EXPECT_TRUE(fails || applied);
        for (const bool dirty : bits_of(*image, spec)) ASSERT_TRUE(dirty);
    }
}

}  // namespace
}  // namespace qcow::test
