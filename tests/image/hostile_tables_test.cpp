// Small files whose tables stand for much.

#include "fuzz/writable_storage.h"
#include "hostile.h"
#include "qcow/copy.h"

namespace qcow::hostile {
namespace {

using ::testing::AnyOf;

TEST_F(Hostile, AMillionEntriesForOneCluster) {
    HostileImage image;
    image.size = bit(36);
    image.l1_entries = 128;
    image.write_refcounts(6 + 128);
    for (std::uint64_t i = 0; i < 128; ++i) {
        image.file.write_word(image.cluster(3) + i * 8, image.cluster(6 + i) | format::copied_bit);
        image.fill(image.cluster(6 + i), 8192, image.cluster(5) | format::copied_bit);
    }
    write("image", image.finish(6 + 128));
    const auto opened = open_bounded(open("image"));
    ASSERT_TRUE(opened.has_value());
    const auto report = check_bounded(**opened);
    ASSERT_TRUE(report.has_value());
    EXPECT_GT(report->corruptions, 0U);
    EXPECT_LE(report->findings.size(), 100U);
    const auto cost = cost_of([&] { EXPECT_TRUE(measure_usage(**opened).has_value()); });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, 64 * MiB * fatness);
}

TEST_F(Hostile, FourMillionL1EntriesForOneL2Table) {
    HostileImage image;
    image.size = bit(51);
    image.l1_entries = bit(22);
    image.write_refcounts(4 + 512 + 2);
    image.fill(image.cluster(3), bit(22), image.cluster(600));
    image.fill(image.cluster(600), 8192, image.cluster(601));
    write("image", image.finish(602));
    const auto opened = open_bounded(open("image"));
    ASSERT_TRUE(opened.has_value());
    EXPECT_TRUE(info_bounded(**opened).has_value());
    const auto report = check_bounded(**opened);
    EXPECT_TRUE(!report || report->corruptions > 0);
    Bytes bytes(MiB);
    EXPECT_TRUE((*opened)->read({bit(50)}, bytes).has_value());
}

TEST_F(Hostile, RefcountTableThatNamesOneBlock) {
    for (const std::uint64_t block : {2U, 1U, 3U, 200U}) {
        HostileImage image;
        image.refcount_table = 8;
        image.refcount_table_clusters = 128;
        image.fill(image.cluster(8), bit(20), image.cluster(block));
        image.fill(image.cluster(2), 8192, 0x0001000100010001);
        write("image", image.finish(201));
        const auto opened = open_bounded(open("image"));
        ASSERT_TRUE(opened.has_value());
        const auto report = check_bounded(**opened);
        ASSERT_TRUE(report.has_value());
        EXPECT_GT(report->corruptions, 0U);
    }
}

TEST_F(Hostile, RefcountBlocksThatAreOtherThings) {
    // The table itself, the L1 table, a place within a cluster, one past the end.
    for (const std::uint64_t at : {std::uint64_t{1} << 16, std::uint64_t{3} << 16, std::uint64_t{0x10200}, bit(60)}) {
        HostileImage image;
        image.file.write_word(image.cluster(1), at);
        const auto opened = open_bounded(image.finish());
        ASSERT_TRUE(opened.has_value());
        const auto report = check_bounded(**opened);
        ASSERT_TRUE(report.has_value());
        EXPECT_GT(report->corruptions, 0U);
    }
}

/// Refcounts of one bit make a block of 2 MiB stand for 16 million clusters, and a block that is nearly a hole is
/// cheap to have.
TEST_F(Hostile, ManyLargeRefcountBlocks) {
    HostileImage image(21);
    image.refcount_order = 0;
    constexpr std::uint64_t blocks = 400;
    for (std::uint64_t i = 0; i < blocks; ++i) {
        image.file.write_word(image.cluster(1) + i * 8, image.cluster(10 + i));
        image.file.segments.push_back({image.cluster(10 + i), Bytes(8, std::byte{0x01})});
    }
    write("image", image.finish(10 + blocks));
    auto opened = open_bounded(open("image"));
    ASSERT_TRUE(opened.has_value());
    const auto report = check_bounded(**opened);
    ASSERT_TRUE(report.has_value());
    EXPECT_FALSE(report->clean());
    opened->reset();
    // A writer looks for the end of what is counted.
    const auto cost = cost_of([&] {
        const auto options = options_for_writing();
        EXPECT_TRUE(open_image(*open_file(path("image"), {.writable = true}), options).has_value());
    });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, max_open_bytes);
}

/// Refcounts are counted anew before a dirty image is written. What is not in use must not cost anything then, either.
TEST_F(Hostile, DirtyImageThatIsNearlyAllHole) {
    HostileImage image(12);
    image.incompatible = 1;
    image.write_refcounts(4);
    image.file.fixed_size = bit(53);
    const auto storage = std::make_shared<fuzz::WritableStorage>(image.finish(), "dirty");
    auto options = options_for(Format::qcow2);
    options.writable = true;
    const auto cost = cost_of([&] {
        const auto opened = open_image(storage, options);
        ASSERT_TRUE(opened.has_value()) << opened.error().message();
        EXPECT_FALSE((*opened)->info()->dirty);
        EXPECT_TRUE(check_bounded(**opened).has_value());
    });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, max_open_bytes);
}

/// What is added behind the end of such a file could not be counted.
TEST_F(Hostile, WritingBehindTheEndOfAHugeHole) {
    HostileImage image(9);
    image.size = 32 * KiB;
    image.write_refcounts(4);
    image.file.fixed_size = bit(55);
    const auto storage = std::make_shared<fuzz::WritableStorage>(image.finish(), "huge");
    const auto options = options_for_writing();
    const auto cost = cost_of([&] {
        const auto opened = open_image(storage, options);
        ASSERT_TRUE(opened.has_value()) << opened.error().message();
        expect_error((*opened)->resize(4 * MiB), Errc::no_space, {"the file cannot grow further in this format"});
    });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, max_open_bytes);
}

TEST_F(Hostile, L2TablesThatAreOtherThings) {
    // Within the header's cluster, the refcount table, the L1 table itself, the end of the file and past it.
    for (const std::uint64_t at : {std::uint64_t{0x200}, std::uint64_t{1} << 16, std::uint64_t{3} << 16,
                                   std::uint64_t{4} << 16, std::uint64_t{1} << 55}) {
        HostileImage image;
        image.write_refcounts(4);
        image.file.write_word(image.cluster(3), at | format::copied_bit);
        const auto opened = open_bounded(image.finish());
        ASSERT_TRUE(opened.has_value());
        std::byte first = {};
        const auto read = (*opened)->read({0}, {&first, 1});
        if (!read) {
            expect_error(read, Errc::corrupt, {"host offset 0x"});
        } else {
            EXPECT_THAT(at, AnyOf(image.cluster(1), image.cluster(3)));  // those whose first entry means something
        }
        const auto report = check_bounded(**opened);
        ASSERT_TRUE(report.has_value());
        EXPECT_GT(report->corruptions, 0U);
    }
}

}  // namespace
}  // namespace qcow::hostile
